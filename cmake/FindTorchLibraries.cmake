# Finds torch by its files: the C++ libraries and headers inside the Python package, or a libtorch.
#
# find_package(Torch) is no help to everybody: the file that comes with a CUDA build of torch ends in an error where the
# machine has no CUDA toolkit, though nothing of the toolkit is needed to compile or link against torch. This module reads
# the same folder and runs none of torch's CMake files.
#
# Looks in, first to last:
#   Torch_DIR                    the folder of TorchConfig.cmake, as find_package(Torch) sets it
#   TorchLibraries_ROOT, CMAKE_PREFIX_PATH (also as environment variables)
#                                torch.utils.cmake_prefix_path or the folder of a libtorch
#   TorchLibraries_HINTS         folders of torch that the caller guesses
#   Python_EXECUTABLE            the torch that it would import (found if it is not set)
#   the system's prefixes
#
# Sets TorchLibraries_FOUND, TorchLibraries_VERSION, TorchLibraries_INCLUDE_DIRS and TorchLibraries_LIBRARY_DIR, and makes the
# target TorchLibraries::torch. Each file found can be overridden: TorchLibraries_INCLUDE_DIR, TorchLibraries_<name>_LIBRARY.

# The folder of torch that Python would import, without importing it. pip, where it builds in an environment of its own, hides
# all packages of the environment that it installs into; there the folder is known by its place.
function(momentum_bn_torch_of_python result)
  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
  set(folder "")
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import importlib.util as i, sysconfig as c; s = i.find_spec('torch')
print(s.submodule_search_locations[0] if s else c.get_path('platlib') + '/torch')"
      OUTPUT_VARIABLE folder ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()

if(Torch_DIR)
  set(TorchLibraries_CONFIG "${Torch_DIR}/TorchConfig.cmake")
endif()
set(TorchLibraries_suffixes Torch share/cmake/Torch lib/cmake/Torch)
find_file(
  TorchLibraries_CONFIG TorchConfig.cmake
  PATHS ${TorchLibraries_ROOT} ENV TorchLibraries_ROOT ${CMAKE_PREFIX_PATH} ENV CMAKE_PREFIX_PATH ${TorchLibraries_HINTS}
  PATH_SUFFIXES ${TorchLibraries_suffixes}
  NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE)
if(NOT TorchLibraries_CONFIG)
  momentum_bn_torch_of_python(TorchLibraries_of_python)
  find_file(
    TorchLibraries_CONFIG TorchConfig.cmake
    PATHS ${TorchLibraries_of_python} ${CMAKE_SYSTEM_PREFIX_PATH}
    PATH_SUFFIXES ${TorchLibraries_suffixes}
    NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE)
endif()

if(TorchLibraries_CONFIG)
  get_filename_component(TorchLibraries_folder "${TorchLibraries_CONFIG}" DIRECTORY)
  get_filename_component(TorchLibraries_folder "${TorchLibraries_folder}/../../.." ABSOLUTE)
endif()

# One tree holds all of it: the system's prefixes, where another torch may lie, are not asked.
find_path(
  TorchLibraries_INCLUDE_DIR torch/csrc/api/include/torch/version.h
  PATHS "${TorchLibraries_folder}/include"
  NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE)
foreach(library IN ITEMS torch torch_cpu c10)
  find_library(
    TorchLibraries_${library}_LIBRARY ${library}
    PATHS "${TorchLibraries_folder}/lib"
    NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH NO_CACHE)
endforeach()

set(TorchLibraries_VERSION "")
foreach(header IN ITEMS torch/headeronly/version.h torch/csrc/api/include/torch/version.h)
  if(NOT TorchLibraries_VERSION AND EXISTS "${TorchLibraries_INCLUDE_DIR}/${header}")
    file(STRINGS "${TorchLibraries_INCLUDE_DIR}/${header}" TorchLibraries_version_lines
         REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
    if(TorchLibraries_version_lines MATCHES "MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+)")
      set(TorchLibraries_VERSION "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}.${CMAKE_MATCH_3}")
    endif()
  endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchLibraries
  REQUIRED_VARS TorchLibraries_torch_LIBRARY TorchLibraries_torch_cpu_LIBRARY TorchLibraries_c10_LIBRARY
                TorchLibraries_INCLUDE_DIR TorchLibraries_VERSION
  VERSION_VAR TorchLibraries_VERSION)

if(TorchLibraries_FOUND)
  set(TorchLibraries_INCLUDE_DIRS "${TorchLibraries_INCLUDE_DIR}"
                                  "${TorchLibraries_INCLUDE_DIR}/torch/csrc/api/include")
  get_filename_component(TorchLibraries_LIBRARY_DIR "${TorchLibraries_torch_cpu_LIBRARY}" DIRECTORY)
endif()

if(TorchLibraries_FOUND AND NOT TARGET TorchLibraries::torch)
  # These are the macros that torch compiled its own headers with: some of its classes have other members without them. The
  # libraries of a CUDA build have macros of their own beside those of torch_cpu.
  set(TorchLibraries_definitions "")
  set(TorchLibraries_targets "${TorchLibraries_folder}/share/cmake/Caffe2/Caffe2Targets.cmake")
  if(EXISTS "${TorchLibraries_targets}")
    file(READ "${TorchLibraries_targets}" TorchLibraries_text)
    if(TorchLibraries_text MATCHES "set_target_properties\\(torch_cpu PROPERTIES[^)]*INTERFACE_COMPILE_DEFINITIONS \"([^\"]*)\"")
      set(TorchLibraries_definitions "${CMAKE_MATCH_1}")
    elseif(NOT TorchLibraries_text MATCHES "set_target_properties\\(torch_cpu PROPERTIES")
      message(WARNING "${TorchLibraries_targets} does not describe torch_cpu: the macros that torch was compiled with are not "
                      "known, and what depends on them, torch.distributed first of all, will be missing.")
    endif()
    unset(TorchLibraries_text)
  endif()

  # libtorch has no symbols of its own: it stands for all of torch's libraries, those of the devices among them, and a linker
  # that drops what it finds no use for must keep it. CMake quotes the path in options as it does for the libraries.
  set(TorchLibraries_libraries "${TorchLibraries_torch_cpu_LIBRARY};${TorchLibraries_c10_LIBRARY}")
  set(TorchLibraries_options "")
  if(APPLE OR WIN32)
    list(PREPEND TorchLibraries_libraries "${TorchLibraries_torch_LIBRARY}")
  else()
    set(TorchLibraries_options "SHELL:-Wl,--push-state,--no-as-needed \"${TorchLibraries_torch_LIBRARY}\" -Wl,--pop-state")
  endif()
  add_library(TorchLibraries::torch INTERFACE IMPORTED GLOBAL)
  set_target_properties(
    TorchLibraries::torch
    PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${TorchLibraries_INCLUDE_DIRS}"
               INTERFACE_COMPILE_DEFINITIONS "${TorchLibraries_definitions}"
               INTERFACE_COMPILE_FEATURES cxx_std_20
               INTERFACE_LINK_LIBRARIES "${TorchLibraries_libraries}"
               INTERFACE_LINK_OPTIONS "${TorchLibraries_options}")
endif()
