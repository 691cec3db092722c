// CMake precompiles headers for the sources of a target; this one has no other.
int main() {}
