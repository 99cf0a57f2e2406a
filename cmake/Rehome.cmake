# rehome_library(NAME [DEPS lib...] [WITHOUT file...]): one static library from the .cc files of this folder (not its
# *_test.cc, not *main.cc and none of WITHOUT), and one test binary NAME_test from its *_test.cc files. Headers are
# included as "folder/name.h".
option(REHOME_STATIC "Link agent and gate statically" ON)

add_library(rehome_flags INTERFACE)
# Quoted includes only: a folder named sys must not stand before the system's own sys/ headers.
target_compile_options(rehome_flags INTERFACE "SHELL:-iquote ${PROJECT_SOURCE_DIR}/src")
target_compile_options(rehome_flags INTERFACE -Wall -Wextra -Wconversion -Wno-missing-field-initializers)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # When it inlines as much as -O3 does, GCC 12 warns about "literal" + std::string (its bug 105651), and about strings
  # inside of aggregates with default initializers as perhaps uninitialized.
  target_compile_options(rehome_flags INTERFACE $<$<CONFIG:Release>:-Wno-restrict -Wno-maybe-uninitialized>)
endif()
if(REHOME_WERROR)
  target_compile_options(rehome_flags INTERFACE -Werror)
endif()

function(rehome_library name)
  cmake_parse_arguments(A "" "" "DEPS;WITHOUT" ${ARGN})
  file(GLOB sources CONFIGURE_DEPENDS *.cc)
  foreach(file ${A_WITHOUT})
    list(REMOVE_ITEM sources ${CMAKE_CURRENT_SOURCE_DIR}/${file})
  endforeach()
  set(tests ${sources})
  list(FILTER tests INCLUDE REGEX "_test\\.cc$")
  list(FILTER sources EXCLUDE REGEX "(_test|main)\\.cc$")
  add_library(${name} STATIC ${sources})
  target_link_libraries(${name} PUBLIC rehome_flags Threads::Threads ${A_DEPS})
  if(REHOME_TESTS AND tests)
    add_executable(${name}_test ${tests})
    target_link_libraries(${name}_test PRIVATE ${name} GTest::gtest_main)
    add_test(NAME ${name} COMMAND ${name}_test --gtest_brief=1)
    set_tests_properties(${name} PROPERTIES TIMEOUT 300 LABELS unit)
  endif()
endfunction()

# rehome_program(NAME STATIC|SHARED DEPS lib...): a binary from this folder's main.cc, put into build/PRESET/bin.
function(rehome_program name linkage)
  cmake_parse_arguments(A "" "" "DEPS" ${ARGN})
  add_executable(${name} main.cc)
  target_link_libraries(${name} PRIVATE ${A_DEPS})
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
  if(linkage STREQUAL STATIC AND REHOME_STATIC)
    # The whole archive of pthread, or a static binary's weak symbols stay null.
    target_link_options(${name} PRIVATE -static)
  endif()
endfunction()
