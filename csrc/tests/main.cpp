// The native code without Python, so that ThreadSanitizer, and LeakSanitizer, see all of it. See .ci/sanitize.
#include <cstdio>

#include "check.h"

int main() {
  test_thread_pool();
  test_concurrent_calls();
  test_acting_allocates_nothing();
  std::puts("native tests passed");
}
