/* SPDX-License-Identifier: BSD-3-Clause */

/* Locks on images: who can use one together with whom, and that a use that is changed
 * leaves just the locks that it needs.  Each open file is as good as a program of its own.
 */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/imagelock.h"

static char path[] = "/tmp/test-imagelock.XXXXXX";

/* Calls of fcntl for locks fail with this, unless it is 0.  It has one of two names. */
static int no_locks;

extern int __real_fcntl64 (int fd, int command, void *arg);
extern int __wrap_fcntl64 (int fd, int command, void *arg);
extern int __wrap_fcntl (int fd, int command, void *arg);

int
__wrap_fcntl64 (int fd, int command, void *arg)
{
  if (no_locks && (command == F_OFD_SETLK || command == F_OFD_GETLK)) {
    errno = no_locks;
    return -1;
  }
  return __real_fcntl64 (fd, command, arg);
}

int
__wrap_fcntl (int fd, int command, void *arg)
{
  return __wrap_fcntl64 (fd, command, arg);
}

static int
open_it (void)
{
  const int fd = open (path, O_RDONLY | O_CLOEXEC);

  assert_true (fd >= 0);
  return fd;
}

/* Can the use of FD be changed? */
static bool
can_change (int fd, enum image_use from, enum image_use use)
{
  bool works;

  errno = 0;
  if (imagelock_change (fd, from, use, &works) == 0) {
    assert_true (works);
    return true;
  }
  assert_int_equal (errno, EAGAIN);
  return false;
}

/* Can another one use it so? */
static bool
others_can (enum image_use use)
{
  const int fd = open_it ();
  const bool r = can_change (fd, IMAGE_UNUSED, use);

  close (fd);
  return r;
}

/* Those of the bytes 100 to 107 and 200 to 207 that somebody has locked, as text. */
static const char *
locked_bytes (void)
{
  static char text[128];
  const int fd = open_it ();

  text[0] = '\0';
  for (int i = 100; i < 208; i = i == 107 ? 200 : i + 1) {
    struct flock lock = { .l_type = F_WRLCK, .l_start = i, .l_len = 1 };
    const size_t length = strlen (text);

    assert_int_equal (fcntl (fd, F_OFD_GETLK, &lock), 0);
    if (lock.l_type != F_UNLCK)
      (void) snprintf (text + length, sizeof text - length, "%d ", i);
  }
  close (fd);
  return text;
}

static void
together (void **state)
{
  const int fd = open_it ();

  (void) state;
  assert_true (others_can (IMAGE_WRITE));
  assert_true (can_change (fd, IMAGE_UNUSED, IMAGE_READ));
  assert_true (others_can (IMAGE_READ));
  assert_false (others_can (IMAGE_WRITE));
  assert_true (can_change (fd, IMAGE_READ, IMAGE_WRITE));
  assert_false (others_can (IMAGE_READ));
  assert_false (others_can (IMAGE_WRITE));
  assert_true (can_change (fd, IMAGE_WRITE, IMAGE_READ));
  assert_true (others_can (IMAGE_READ));
  assert_true (can_change (fd, IMAGE_READ, IMAGE_UNUSED));
  assert_true (others_can (IMAGE_WRITE));
  close (fd);
}

/* The bytes are those that qemu has for the same. */
static void
bytes (void **state)
{
  const int fd = open_it (), other = open_it ();

  (void) state;
  assert_true (can_change (fd, IMAGE_UNUSED, IMAGE_READ));
  assert_string_equal (locked_bytes (), "100 201 203 ");
  assert_true (can_change (fd, IMAGE_READ, IMAGE_WRITE));
  assert_string_equal (locked_bytes (), "100 101 103 201 203 ");
  assert_true (can_change (fd, IMAGE_WRITE, IMAGE_READ));
  assert_string_equal (locked_bytes (), "100 201 203 ");

  /* What was refused leaves nothing behind, and takes nothing away. */
  assert_true (can_change (other, IMAGE_UNUSED, IMAGE_READ));
  assert_false (can_change (other, IMAGE_READ, IMAGE_WRITE));
  assert_string_equal (locked_bytes (), "100 201 203 ");
  close (fd);
  assert_string_equal (locked_bytes (), "100 201 203 ");
  assert_true (can_change (other, IMAGE_READ, IMAGE_WRITE));
  close (other);
  assert_string_equal (locked_bytes (), "");
}

/* The locks stay where a process goes into the background. */
static void
forked (void **state)
{
  const int fd = open_it ();
  int ends[2];
  char c;

  (void) state;
  assert_int_equal (pipe (ends), 0);
  assert_true (can_change (fd, IMAGE_UNUSED, IMAGE_WRITE));
  const pid_t pid = fork ();
  assert_true (pid >= 0);
  if (pid == 0) {
    close (ends[1]);
    _exit (read (ends[0], &c, 1) == 0 ? 0 : 1);
  }
  close (ends[0]);
  close (fd);
  assert_false (others_can (IMAGE_READ));
  close (ends[1]);
  assert_int_equal (waitpid (pid, NULL, 0), pid);
  assert_true (others_can (IMAGE_WRITE));
}

static void
without_locks (void **state)
{
  static const int errors[] = { ENOLCK, EOPNOTSUPP, EINVAL };
  const int fd = open_it ();
  bool works;

  (void) state;
  for (size_t i = 0; i < sizeof errors / sizeof errors[0]; ++i) {
    no_locks = errors[i];
    works = true;
    assert_int_equal (imagelock_change (fd, IMAGE_UNUSED, IMAGE_WRITE, &works),
                      0);
    assert_false (works);
  }
  no_locks = EIO;
  assert_int_equal (imagelock_change (fd, IMAGE_UNUSED, IMAGE_WRITE, &works),
                    -1);
  assert_int_equal (errno, EIO);
  no_locks = 0;
  assert_string_equal (locked_bytes (), "");
  close (fd);
}

int
main (void)
{
  const struct CMUnitTest tests[] = {
    cmocka_unit_test (together),
    cmocka_unit_test (bytes),
    cmocka_unit_test (forked),
    cmocka_unit_test (without_locks),
  };
  const int fd = mkstemp (path);

  if (fd == -1)
    return 99;
  close (fd);
  const int r = cmocka_run_group_tests (tests, NULL, NULL);
  unlink (path);
  return r;
}
