/* SPDX-License-Identifier: BSD-3-Clause */

/* A target for libFuzzer: each input is a file that is to be loaded.
 *
 * An image is refused with one message, or it can be brought into an overlay:
 * whatever the check lets pass, the transfer takes.  fuzz-corpus.sh makes images
 * to begin with.  Without libFuzzer this is a program that loads the files that
 * are its arguments, once each.
 */

#include <config.h>

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blk.h"
#include "common/cleanup.h"
#include "images/load.h"
#include "nbdkit-stubs.h"

#define NAME "input"

/* Larger images are checked only. */
#define MAX_DISK (UINT64_C (1) << 30)
#define MAX_CHANGED (UINT64_C (16) << 20)

#define PAGE ((size_t) 4096)

static const char *dir = "/dev/shm";
static int file = -1;
static const uint8_t *zeroes; /* MAX_DISK bytes, for the base to read */

extern int LLVMFuzzerTestOneInput (const uint8_t *bytes, size_t size);

static void
start (void)
{
  file = memfd_create (NAME, MFD_CLOEXEC);
  zeroes = mmap (NULL, MAX_DISK, PROT_READ,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stderr = fopen ("/dev/null", "w"); /* not for libFuzzer, which has its own */
  if (file == -1 || zeroes == MAP_FAILED || !stderr)
    abort ();
  if (access (dir, W_OK) == -1)
    dir = "/var/tmp";
}

static void
check (int condition)
{
  if (!condition) {
    /* Bypasses stdio's stderr. */
    (void) !write (STDERR_FILENO, last_error, strlen (last_error));
    abort ();
  }
}

/* The input becomes a file with holes where it has pages of zeroes. */
static void
write_file (const uint8_t *bytes, size_t size)
{
  check (ftruncate (file, 0) == 0 && ftruncate (file, (off_t) size) == 0);
  for (size_t pos = 0; pos < size; pos += PAGE) {
    const size_t count = MIN (PAGE, size - pos);

    if (memcmp (bytes + pos, zeroes, count) != 0)
      check (pwrite (file, bytes + pos, count, (off_t) pos)
             == (ssize_t) count);
  }
}

static void
read_some (struct overlay *overlay, const struct base *base)
{
  static uint8_t buf[65536];
  const uint64_t size = overlay_size (overlay);
  const uint64_t count = MIN (size, sizeof buf);
  const uint64_t offsets[] = { 0, (size - count) / 2, size - count };
  int err;

  for (unsigned i = 0; i < 3 && count > 0; ++i)
    check (blk_read (live_disk (overlay), base, ON_READ_PASS, buf,
                     (uint32_t) count, offsets[i], &err)
           == 0);
}

static void
load (const struct loaded *image, uint32_t block_size)
{
  struct fake_base fake
    = { .bytes = zeroes, .size = load_header (image)->disk_size };
  struct base base;
  const struct overlay_options options
    = { .block_size = block_size, .dir = dir };
  struct overlay *overlay = overlay_new (fake.size, &options);

  check (overlay && base_init (&base, fake_next (&fake)) == 0);
  check (load_into (image, overlay, &base) == 0);
  read_some (overlay, &base);
  overlay_free (overlay);
}

int
LLVMFuzzerTestOneInput (const uint8_t *bytes, size_t size)
{
  static const uint32_t block_sizes[] = { 512, 4096, 65536 };

  if (file == -1)
    start ();
  write_file (bytes, size);
  nr_errors = 0;

  struct loaded *image = load_open (NAME, fcntl (file, F_DUPFD_CLOEXEC, 0));
  if (!image) {
    check (nr_errors == 1
           && strncmp (last_error, "cow-load=" NAME ": ", 16) == 0);
    return 0;
  }
  check (nr_errors == 0);
  if (load_header (image)->disk_size <= MAX_DISK
      && load_changed_bytes (image) <= MAX_CHANGED)
    load (image, block_sizes[size % 3]);
  load_close (image);
  return 0;
}

#ifndef COW_LIBFUZZER
int
main (int argc, char **argv)
{
  for (int i = 1; i < argc; ++i) {
    const int fd = open (argv[i], O_RDONLY | O_CLOEXEC);
    const off_t size = lseek (fd, 0, SEEK_END);
    CLEANUP_FREE uint8_t *bytes = malloc (size > 0 ? (size_t) size : 1);

    if (!bytes || pread (fd, bytes, (size_t) size, 0) != size) {
      perror (argv[i]);
      return 1;
    }
    close (fd);
    LLVMFuzzerTestOneInput (bytes, (size_t) size);
    printf ("%s: %s\n", argv[i], nr_errors ? last_error : "loaded");
  }
  return 0;
}
#endif
