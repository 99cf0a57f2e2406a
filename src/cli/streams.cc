#include "cli/streams.h"

#include <fcntl.h>
#include <unistd.h>

namespace rehome::cli {

void ensure_standard_streams() {
  // open() gives the lowest free number.
  int fd = ::open("/dev/null", O_RDWR);
  while (fd >= 0 && fd <= 2) fd = ::open("/dev/null", O_RDWR);
  if (fd > 2) ::close(fd);
}

}  // namespace rehome::cli
