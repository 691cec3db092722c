// Preloaded into the trainer, makes one of its calls on files fail. Calls of the C library alone are seen, and those on
// files below one folder alone count, so that what happens to libraries as they are loaded is left out.
//
//   FAULT_FOLDER  the folder
//   FAULT_LOG     a file elsewhere that gets a line "NUMBER CALL PATH" for each call that counts
//   FAULT_AT      number of the call that fails, from 1; not set: none
//   FAULT_KIND    what it does: a number of <errno.h>, "short" (reads or writes only half) or "kill" (ends the process)

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

int __xstat(int version, const char* path, struct stat* status);
int __lxstat(int version, const char* path, struct stat* status);

static atomic_long calls;

/// The C library's own function.
#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

static void note(long number, const char* call, const char* path) {
  const char* log = getenv("FAULT_LOG");
  char line[PATH_MAX + 64];
  const int length = snprintf(line, sizeof(line), "%ld %s %s\n", number, call, path);
  const long file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  syscall(SYS_write, file, line, (size_t)length);
  syscall(SYS_close, file);
}

/// Whether the call fails; errno is then set.
/// @param size  bytes to read or write, made fewer where that is what happens; null: neither
static bool fails(const char* call, const char* path, size_t* size) {
  const char* folder = getenv("FAULT_FOLDER");
  if (folder == NULL || path == NULL || strncmp(path, folder, strlen(folder)) != 0) {
    return false;
  }
  const long number = atomic_fetch_add(&calls, 1) + 1;
  note(number, call, path);
  const char* at = getenv("FAULT_AT");
  if (at == NULL || number != atol(at)) {
    return false;
  }
  const char* kind = getenv("FAULT_KIND");
  if (strcmp(kind, "kill") == 0) {
    kill(getpid(), SIGKILL);
  }
  if (strcmp(kind, "short") == 0) {
    if (size != NULL && *size > 1) {
      *size /= 2;
    }
    return false;
  }
  errno = atoi(kind);
  return true;
}

static bool fails_on(const char* call, int descriptor, size_t* size) {
  const int before = errno;
  char link[64];
  char path[PATH_MAX] = "";
  snprintf(link, sizeof(link), "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  path[length < 0 ? 0 : length] = '\0';
  errno = before;
  return fails(call, path, size);
}

#define MODE_OF(flags, mode)                    \
  mode_t mode = 0;                              \
  if (((flags) & (O_CREAT | O_TMPFILE)) != 0) { \
    va_list more;                               \
    va_start(more, flags);                      \
    mode = va_arg(more, mode_t);                \
    va_end(more);                               \
  }

#define OPEN(name)                                                         \
  int name(const char* path, int flags, ...) {                             \
    MODE_OF(flags, mode)                                                   \
    return fails("open", path, NULL) ? -1 : REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                               \
  int name(int folder, const char* path, int flags, ...) {                         \
    MODE_OF(flags, mode)                                                           \
    return fails("open", path, NULL) ? -1 : REAL(name)(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

FILE* fopen(const char* path, const char* mode) { return fails("open", path, NULL) ? NULL : REAL(fopen)(path, mode); }
FILE* fopen64(const char* path, const char* mode) {
  return fails("open", path, NULL) ? NULL : REAL(fopen64)(path, mode);
}
DIR* opendir(const char* path) { return fails("open", path, NULL) ? NULL : REAL(opendir)(path); }
struct dirent* readdir(DIR* folder) { return fails_on("readdir", dirfd(folder), NULL) ? NULL : REAL(readdir)(folder); }

ssize_t read(int descriptor, void* into, size_t size) {
  return fails_on("read", descriptor, &size) ? -1 : REAL(read)(descriptor, into, size);
}
ssize_t write(int descriptor, const void* from, size_t size) {
  return fails_on("write", descriptor, &size) ? -1 : REAL(write)(descriptor, from, size);
}
ssize_t writev(int descriptor, const struct iovec* parts, int count) {
  return fails_on("write", descriptor, NULL) ? -1 : REAL(writev)(descriptor, parts, count);
}

// Standard error and output, whose own calls of write no preloaded library sees: the one writes at once, the other when
// it is flushed.
size_t fwrite(const void* from, size_t size, size_t count, FILE* file) {
  return file == stderr && fails_on("write", fileno(file), NULL) ? 0 : REAL(fwrite)(from, size, count, file);
}
int putc(int character, FILE* file) {
  return file == stderr && fails_on("write", fileno(file), NULL) ? EOF : REAL(putc)(character, file);
}
int fflush(FILE* file) {
  const bool writes = file != NULL && __fpending(file) > 0;
  return writes && fails_on("write", fileno(file), NULL) ? EOF : REAL(fflush)(file);
}

int fsync(int descriptor) { return fails_on("fsync", descriptor, NULL) ? -1 : REAL(fsync)(descriptor); }
int ftruncate(int descriptor, off_t size) {
  return fails_on("truncate", descriptor, NULL) ? -1 : REAL(ftruncate)(descriptor, size);
}
int close(int descriptor) {
  // The descriptor is free again, also where closing it fails.
  const bool failed = fails_on("close", descriptor, NULL);
  const int reason = errno;
  const int result = REAL(close)(descriptor);
  errno = failed ? reason : errno;
  return failed ? -1 : result;
}
int rename(const char* from, const char* to) { return fails("rename", to, NULL) ? -1 : REAL(rename)(from, to); }
int unlink(const char* path) { return fails("unlink", path, NULL) ? -1 : REAL(unlink)(path); }
int remove(const char* path) { return fails("unlink", path, NULL) ? -1 : REAL(remove)(path); }
int mkdir(const char* path, mode_t mode) { return fails("mkdir", path, NULL) ? -1 : REAL(mkdir)(path, mode); }
int stat(const char* path, struct stat* status) { return fails("stat", path, NULL) ? -1 : REAL(stat)(path, status); }
int lstat(const char* path, struct stat* status) { return fails("stat", path, NULL) ? -1 : REAL(lstat)(path, status); }
int fstat(int descriptor, struct stat* status) {
  return fails_on("stat", descriptor, NULL) ? -1 : REAL(fstat)(descriptor, status);
}
// The same under the names by which programs that older systems have compiled, such as torch, call them.
int __xstat(int version, const char* path, struct stat* status) {
  return fails("stat", path, NULL) ? -1 : REAL(__xstat)(version, path, status);
}
int __lxstat(int version, const char* path, struct stat* status) {
  return fails("stat", path, NULL) ? -1 : REAL(__lxstat)(version, path, status);
}
void* mmap(void* at, size_t size, int protection, int flags, int descriptor, off_t offset) {
  return descriptor >= 0 && fails_on("mmap", descriptor, NULL)
             ? MAP_FAILED
             : (void*)syscall(SYS_mmap, at, size, protection, flags, descriptor, offset);
}
