/* Sees the calls of this process on paths below one directory, on its data and on its standard
output, and strikes at one of them.

Loaded by LD_PRELOAD; idle until `faults_arm`. What to strike, and how, stands in a control
file, shared by all ranks of a job; shim.py describes and fills it. The struck call is not made: it
fails with an errno, or a signal comes before it. Of a write that is struck, the first half is
made: what a full disk and a kill leave of it.

Not seen: mapped files, io_uring, writes of stdio's own buffers. Nothing that saves uses them
(test_faults.py holds what is seen against the files that a run leaves).
*/

#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* The order of shim.py's Call. */
enum { OPEN, CREATE, READ, WRITE, MKDIR, RENAME, UNLINK, SYNC, KINDS };
enum { SELF, GROUP, LAUNCHER, EVERYONE };

struct control {
  int64_t ranks;        /* bit r: rank r is struck */
  int64_t kind;         /* of the struck call: the at-th of this kind on a path like `pattern` */
  int64_t at;           /* from 1; 0: none */
  int64_t error;        /* errno of the struck call, or 0 */
  int64_t lasting;      /* bit: so do all later calls of this kind fail */
  int64_t signal;       /* sent there, or 0 */
  int64_t whom;
  int64_t microseconds; /* after arming, the signal is sent; 0: never */
  int64_t workers;      /* not the ranks are struck but the processes that they start */
  _Atomic int64_t counted;
  _Atomic int64_t struck;
  _Atomic int64_t committed;
  int64_t commits[64]; /* numbers that became the name of what had none */
  char directory[PATH_MAX];
  char data[PATH_MAX];    /* a directory; its paths are seen as data/... */
  char pattern[PATH_MAX]; /* fnmatch's, of a path relative to the directory */
  char place[PATH_MAX];   /* the name of the struck call's */
  char trace[PATH_MAX];   /* a file for all calls, or empty */
};

static struct control *control;
static int64_t rank, launcher, began;
static pid_t armed;
static struct stat console; /* standard output, as it was then */
static int trace = -1;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}

static int64_t microseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * (int64_t)1000000 + now.tv_nsec / 1000;
}

/* The absolute path of `path` seen from `dirfd`, or of the file `dirfd` itself where it is NULL. */
static void absolute(char *out, int dirfd, const char *path) {
  size_t length = 0;
  if (!path || path[0] != '/') {
    char link[64];
    if (dirfd == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    length = n < 0 ? 0 : (size_t)n;
    if (path) out[length++] = '/';
  }
  if (path) snprintf(out + length, PATH_MAX - length, "%s", path);
  else out[length] = 0;
}

static void send_signal(void) {
  int number = (int)control->signal;
  int64_t whom = launcher ? control->whom : control->whom == SELF ? SELF : GROUP;
  if (whom == LAUNCHER || whom == EVERYONE) kill((pid_t)launcher, number);
  if (whom == GROUP || whom == EVERYONE) kill(0, number);
  if (whom == SELF) kill(getpid(), number);
  while (number == SIGKILL) pause();
}

/* The path below `directory`, or NULL. */
static char *below(char *place, const char *directory) {
  size_t length = strlen(directory);
  if (!length || strncmp(place, directory, length) || (place[length] && place[length] != '/'))
    return NULL;
  return place + length + (place[length] == '/');
}

/* Whether it is what standard output was, and has not been led elsewhere. */
static int is_console(int fd) {
  struct stat now;
  return fd == STDOUT_FILENO && !fstat(fd, &now) && now.st_dev == console.st_dev &&
         now.st_ino == console.st_ino;
}

/* The name by which a file is known here, or an empty one. */
static void name_of(char *out, int dirfd, const char *path) {
  char place[PATH_MAX], *name;
  out[0] = 0;
  if (!path && is_console(dirfd)) {
    strcpy(out, "console");
    return;
  }
  absolute(place, dirfd, path);
  if ((name = below(place, control->directory))) snprintf(out, PATH_MAX, "%s", name);
  else if ((name = below(place, control->data))) snprintf(out, PATH_MAX, "data/%.4000s", name);
}

/* Where a lasting error lasts: in the run's directory, its data, its console. */
static int area(const char *name) {
  return !strcmp(name, "console") ? 2 : !strncmp(name, "data/", 5);
}

/* What befalls the call: 0, nothing; an errno; SIGNAL, which the caller sends; of a write, HALF is
   made first: what a kill leaves of it, or a full disk, which fails the next one. */
enum { HALF = 1 << 16, SIGNAL = 1 << 17 };
static int strike(int kind, int dirfd, const char *path) {
  if (!control) return 0;
  int before = errno;
  char name[PATH_MAX];
  name_of(name, dirfd, path);
  errno = before;
  if (!name[0]) return 0;
  if (trace >= 0)
    dprintf(trace, "%ld %d %ld %s\n", (long)rank, kind, (long)(microseconds() - began), name);
  if (!(control->ranks >> rank & 1) || (control->workers && getpid() == armed)) return 0;
  int lasts = control->lasting >> kind & 1 && area(name) == area(control->pattern);
  if (atomic_load(&control->struck)) return lasts ? (int)control->error : 0;
  if (kind != control->kind || fnmatch(control->pattern, name, 0)) return 0;
  if (atomic_fetch_add(&control->counted, 1) + 1 != control->at) return 0;
  memcpy(control->place, name, PATH_MAX);
  atomic_store(&control->struck, 1 + kind);
  int half = kind == WRITE && (control->signal == SIGKILL || lasts) ? HALF : 0;
  return half | (control->signal ? SIGNAL : (int)control->error);
}

#define STRIKE(kind, dirfd, path, failed)          \
  do {                                             \
    int struck = strike(kind, dirfd, path);        \
    if (struck & SIGNAL) send_signal();            \
    else if (struck) return errno = struck, failed; \
  } while (0)

static int changes(int flags) {
  return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC) ? CREATE : OPEN;
}

static void *timed(void *unused) {
  struct timespec left = {control->microseconds / 1000000, control->microseconds % 1000000 * 1000};
  while (nanosleep(&left, &left)) continue;
  snprintf(control->place, PATH_MAX, "a moment");
  atomic_store(&control->struck, 1 + KINDS);
  send_signal();
  return unused;
}

/* Begins, as rank `self` of a job that process `parent` launched (0: it is alone). */
int faults_arm(const char *path, int self, int parent) {
  int file = REAL(open)(path, O_RDWR);
  void *shared = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (file < 0 || shared == MAP_FAILED || self >= 64) return -1;
  struct control *wanted = shared;
  if (wanted->trace[0]) trace = REAL(open)(wanted->trace, O_WRONLY | O_APPEND | O_CREAT, 0644);
  if (fstat(STDOUT_FILENO, &console)) return -1;
  armed = getpid(), rank = self, launcher = parent, began = microseconds(), control = wanted;
  pthread_t thread;
  if (control->microseconds && control->ranks >> rank & 1)
    return pthread_create(&thread, NULL, timed, NULL);
  return 0;
}

/* ---- what is counted ---- */

#define OPENS(name)                                        \
  int name(const char *path, int flags, ...) {             \
    va_list rest;                                          \
    va_start(rest, flags);                                 \
    mode_t mode = va_arg(rest, mode_t);                    \
    va_end(rest);                                          \
    STRIKE(changes(flags), AT_FDCWD, path, -1);            \
    return REAL(name)(path, flags, mode);                  \
  }
#define OPENS_AT(name)                                     \
  int name(int dirfd, const char *path, int flags, ...) {  \
    va_list rest;                                          \
    va_start(rest, flags);                                 \
    mode_t mode = va_arg(rest, mode_t);                    \
    va_end(rest);                                          \
    STRIKE(changes(flags), dirfd, path, -1);               \
    return REAL(name)(dirfd, path, flags, mode);           \
  }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

int __open_2(const char *path, int flags) {
  STRIKE(changes(flags), AT_FDCWD, path, -1);
  return REAL(open)(path, flags);
}
int __open64_2(const char *path, int flags) { return __open_2(path, flags | O_LARGEFILE); }
int __openat_2(int dirfd, const char *path, int flags) {
  STRIKE(changes(flags), dirfd, path, -1);
  return REAL(openat)(dirfd, path, flags);
}
int __openat64_2(int dirfd, const char *path, int flags) {
  return __openat_2(dirfd, path, flags | O_LARGEFILE);
}

#define FOPENS(name)                                                            \
  FILE *name(const char *path, const char *mode) {                              \
    STRIKE(mode[0] == 'r' && !strchr(mode, '+') ? OPEN : CREATE, AT_FDCWD, path, NULL); \
    return REAL(name)(path, mode);                                              \
  }
FOPENS(fopen)
FOPENS(fopen64)

DIR *opendir(const char *path) {
  STRIKE(OPEN, AT_FDCWD, path, NULL);
  return REAL(opendir)(path);
}

ssize_t read(int fd, void *data, size_t size) {
  STRIKE(READ, fd, NULL, -1);
  return REAL(read)(fd, data, size);
}
ssize_t readv(int fd, const struct iovec *parts, int count) {
  STRIKE(READ, fd, NULL, -1);
  return REAL(readv)(fd, parts, count);
}
#define PREADS(name, offset_t)                                        \
  ssize_t name(int fd, void *data, size_t size, offset_t offset) {    \
    STRIKE(READ, fd, NULL, -1);                                       \
    return REAL(name)(fd, data, size, offset);                        \
  }
PREADS(pread, off_t)
PREADS(pread64, off64_t)

#define STRIKE_WRITE(fd, size, half)                                    \
  do {                                                                  \
    int struck = strike(WRITE, fd, NULL);        \
    ssize_t made = struck & HALF && (size) > 1 ? (half) : 0;            \
    if (struck & SIGNAL) send_signal();                                 \
    else if (struck && made > 0) return made;                           \
    else if (struck) return errno = struck & ~HALF, -1;                 \
  } while (0)

ssize_t write(int fd, const void *data, size_t size) {
  STRIKE_WRITE(fd, size, REAL(write)(fd, data, size / 2));
  return REAL(write)(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  STRIKE_WRITE(fd, parts->iov_len, REAL(write)(fd, parts->iov_base, parts->iov_len / 2));
  return REAL(writev)(fd, parts, count);
}
#define PWRITES(name, offset_t)                                                  \
  ssize_t name(int fd, const void *data, size_t size, offset_t offset) {         \
    STRIKE_WRITE(fd, size, REAL(name)(fd, data, size / 2, offset));              \
    return REAL(name)(fd, data, size, offset);                                   \
  }
PWRITES(pwrite, off_t)
PWRITES(pwrite64, off64_t)
#define PWRITEVS(name, offset_t)                                                 \
  ssize_t name(int fd, const struct iovec *parts, int count, offset_t offset) {  \
    STRIKE(WRITE, fd, NULL, -1);                                                 \
    return REAL(name)(fd, parts, count, offset);                                 \
  }
PWRITEVS(pwritev, off_t)
PWRITEVS(pwritev64, off64_t)

#define TRUNCATES(name, offset_t)            \
  int name(int fd, offset_t size) {          \
    STRIKE(WRITE, fd, NULL, -1);             \
    return REAL(name)(fd, size);             \
  }
TRUNCATES(ftruncate, off_t)
TRUNCATES(ftruncate64, off64_t)

int mkdir(const char *path, mode_t mode) {
  STRIKE(MKDIR, AT_FDCWD, path, -1);
  return REAL(mkdir)(path, mode);
}
int mkdirat(int dirfd, const char *path, mode_t mode) {
  STRIKE(MKDIR, dirfd, path, -1);
  return REAL(mkdirat)(dirfd, path, mode);
}
/* The name of the path where it is a number, else -1. */
static int number_of(const char *path) {
  const char *name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
  return name[0] && !name[strspn(name, "0123456789")] ? atoi(name) : -1;
}
int rename(const char *from, const char *to) {
  STRIKE(RENAME, AT_FDCWD, to, -1);
  int failed = REAL(rename)(from, to);
  if (!failed && control && number_of(to) >= 0 && number_of(from) < 0)
    control->commits[atomic_fetch_add(&control->committed, 1) % 64] = number_of(to);
  return failed;
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) {
  STRIKE(RENAME, to_fd, to, -1);
  return REAL(renameat)(from_fd, from, to_fd, to);
}
int unlink(const char *path) {
  STRIKE(UNLINK, AT_FDCWD, path, -1);
  return REAL(unlink)(path);
}
int unlinkat(int dirfd, const char *path, int flags) {
  STRIKE(UNLINK, dirfd, path, -1);
  return REAL(unlinkat)(dirfd, path, flags);
}
int rmdir(const char *path) {
  STRIKE(UNLINK, AT_FDCWD, path, -1);
  return REAL(rmdir)(path);
}
int fsync(int fd) {
  STRIKE(SYNC, fd, NULL, -1);
  return REAL(fsync)(fd);
}
int fdatasync(int fd) {
  STRIKE(SYNC, fd, NULL, -1);
  return REAL(fdatasync)(fd);
}
