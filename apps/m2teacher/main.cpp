#include "cli.h"

int main(int argc, char** argv) { return m2teacher::run(argc, argv); }
