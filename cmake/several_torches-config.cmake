# CMake package of momentum_bn in the wheel that has a library for each of several minor versions of torch, where it is named
# momentum_bn-config.cmake: finds torch, then takes the package of the library that was built against it, in lib/torch-MINOR.

get_filename_component(momentum_bn_libraries "${CMAKE_CURRENT_LIST_DIR}/../.." ABSOLUTE)

# torch: the one that the caller names (Torch_DIR, CMAKE_PREFIX_PATH), else the one beside this package in site-packages, else
# the one that Python imports. FindTorchLibraries.cmake says more.
set(TorchLibraries_HINTS "${momentum_bn_libraries}/../../torch")
list(PREPEND CMAKE_MODULE_PATH "${CMAKE_CURRENT_LIST_DIR}")
find_package(TorchLibraries QUIET)
list(POP_FRONT CMAKE_MODULE_PATH)
unset(TorchLibraries_HINTS)

file(GLOB momentum_bn_torches RELATIVE "${momentum_bn_libraries}" "${momentum_bn_libraries}/torch-*")
list(TRANSFORM momentum_bn_torches REPLACE "torch-" "")
list(SORT momentum_bn_torches COMPARE NATURAL)
list(JOIN momentum_bn_torches ", " momentum_bn_torches)
string(REGEX MATCH "^[0-9]+\\.[0-9]+" momentum_bn_torch "${TorchLibraries_VERSION}")
set(momentum_bn_package "${momentum_bn_libraries}/torch-${momentum_bn_torch}/cmake/momentum_bn/momentum_bn-config.cmake")

unset(momentum_bn_NOT_FOUND_MESSAGE)
if(NOT TorchLibraries_FOUND)
  set(momentum_bn_NOT_FOUND_MESSAGE
      "momentum_bn ${momentum_bn_VERSION} has libraries for torch ${momentum_bn_torches}, and no torch was found: name it with \
-DTorch_DIR=...")
elseif(NOT EXISTS "${momentum_bn_package}")
  set(momentum_bn_NOT_FOUND_MESSAGE
      "momentum_bn ${momentum_bn_VERSION} has libraries for torch ${momentum_bn_torches}, but torch ${TorchLibraries_VERSION} was \
found in ${TorchLibraries_LIBRARY_DIR}. Name one of these with -DTorch_DIR=..., or build momentum_bn with this one, in the folder \
of its sources (pip install --no-build-isolation --force-reinstall --no-deps ., or CMake)")
endif()
if(momentum_bn_NOT_FOUND_MESSAGE)
  set(momentum_bn_FOUND FALSE)
  return()
endif()

include("${momentum_bn_package}")
