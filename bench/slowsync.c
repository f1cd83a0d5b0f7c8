/* A disk that takes its time: every fsync and fdatasync of the process sleeps first.
 *
 *   LD_PRELOAD=slowsync.so SLOWSYNC_US=5000 SLOWSYNC_COUNT=FILE program
 *
 * FILE holds the number of syncs so far, eight bytes in the machine's order: it shows that they came this way.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static _Atomic uint64_t unshared;
static _Atomic uint64_t *count = &unshared;
static struct timespec pause_for;
static int (*real_fsync)(int), (*real_fdatasync)(int);

__attribute__((constructor)) static void begin(void)
{
    const char *us = getenv("SLOWSYNC_US"), *path = getenv("SLOWSYNC_COUNT");
    long wanted = us ? atol(us) : 0;
    pause_for = (struct timespec){wanted / 1000000, wanted % 1000000 * 1000};
    real_fsync = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int fd = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd < 0)
        return;
    void *shared = ftruncate(fd, sizeof *count) ? MAP_FAILED
                                                : mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (shared != MAP_FAILED)
        count = shared;
}

static void wait_for_disk(void)
{
    ++*count;
    nanosleep(&pause_for, NULL);
}

int fsync(int fd)
{
    wait_for_disk();
    return real_fsync(fd);
}

int fdatasync(int fd)
{
    wait_for_disk();
    return real_fdatasync(fd);
}
