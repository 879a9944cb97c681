/* SPDX-License-Identifier: BSD-3-Clause */

/* The overlay file without a server. */

#include <config.h>

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "faults.h"
#include "overlay/store.h"
#include "server/tmpdir.h"

#define BLOCK UINT64_C (131072)

static char dir[4096];
static struct store store;

static int
set_up (void **state)
{
  (void) state;
  store_init (&store, dir, NEWFILE_ANONYMOUS, STORE_WRITES_BACK_LATE);
  return 0;
}

static int
set_up_file (void **state)
{
  return set_up (state) || store_make_file (&store);
}

static int
tear_down (void **state)
{
  (void) state;
  store_destroy (&store);
  fail_calls_from (0, 0);
  short_transfers = fail_punches = fail_truncates = no_tmpfile = false;
  return 0;
}

static uint64_t
bytes_used (void)
{
  struct stat st;

  assert_int_equal (fstat (store.file.fd, &st), 0);
  return (uint64_t) st.st_blocks * 512;
}

static void
write_bytes (const char *bytes, size_t count, uint64_t offset)
{
  struct iovec iov = { .iov_base = (char *) bytes, .iov_len = count };

  assert_int_equal (store_writev (&store, &iov, 1, offset), 0);
}

static void
file_is_made_once (void **state)
{
  struct stat st;

  (void) state;
  assert_int_equal (store.file.fd, -1);
  assert_int_equal (store_make_file (&store), 0);
  assert_int_equal (fstat (store.file.fd, &st), 0);
  assert_int_equal (st.st_nlink, 0);
  assert_int_equal (st.st_mode & 0777, 0600);
  assert_true (fcntl (store.file.fd, F_GETFD) & FD_CLOEXEC);

  const int fd = store.file.fd;

  fail_calls_from (1, ENOENT);
  assert_int_equal (store_make_file (&store), 0);
  assert_int_equal (call_has_failed (), 0);
  assert_int_equal (store.file.fd, fd);
}

static void
file_without_tmpfile (void **state)
{
  no_tmpfile = true;
  file_is_made_once (state);
  assert_int_equal (rmdir (dir), 0); /* nothing is left in it */
  assert_int_equal (mkdir (dir, 0700), 0);
}

static void
directory_is_gone (void **state)
{
  (void) state;
  assert_int_equal (rmdir (dir), 0);
  assert_int_equal (store_make_file (&store), -1);
  assert_int_equal (errno, ENOENT);
  assert_int_equal (mkdir (dir, 0700), 0);
  assert_int_equal (store_make_file (&store), 0);
}

static void
copied_bytes (void **state)
{
  static char bytes[BLOCK], copy[BLOCK];

  (void) state;
  for (size_t i = 0; i < sizeof bytes; ++i)
    bytes[i] = (char) (i / 3);
  write_bytes (bytes, sizeof bytes, BLOCK);
  short_transfers = true;
  assert_int_equal (store_copy (&store, BLOCK, 2 * BLOCK, BLOCK), 0);
  short_transfers = false;
  assert_int_equal (store_read (&store, copy, BLOCK, 2 * BLOCK), 0);
  assert_memory_equal (copy, bytes, BLOCK);
  for (int n = 1; n <= 4; ++n) {
    fail_calls_from (n, ENOSPC);
    assert_int_equal (store_copy (&store, BLOCK, 2 * BLOCK, BLOCK), -1);
    assert_int_equal (errno, ENOSPC);
    assert_int_equal (call_has_failed (), ENOSPC);
  }
}

static void
punched_bytes_are_given_back (void **state)
{
  static char bytes[2 * BLOCK], got[2 * BLOCK];

  (void) state;
  memset (bytes, 'x', sizeof bytes);
  write_bytes (bytes, sizeof bytes, BLOCK);
  assert_true (bytes_used () >= 2 * BLOCK);
  store_punch (&store, BLOCK, BLOCK);
  assert_true (bytes_used () < 2 * BLOCK);
  memset (bytes, 0, BLOCK);
  assert_int_equal (store_read (&store, got, sizeof got, BLOCK), 0);
  assert_memory_equal (got, bytes, sizeof got);
}

static void
punching_keeps_errno (void **state)
{
  (void) state;
  fail_punches = true;
  errno = ENOSPC;
  store_punch (&store, BLOCK, BLOCK);
  assert_int_equal (errno, ENOSPC);
}

/* What is there stays. */
static void
space_is_set_aside (void **state)
{
  char byte = 0;

  (void) state;
  write_bytes ("x", 1, 5);
  assert_int_equal (store_set_aside (&store, 0, 2 * BLOCK), 0);
  assert_true (bytes_used () >= 2 * BLOCK);
  assert_int_equal (store_read (&store, &byte, 1, 5), 0);
  assert_int_equal (byte, 'x');
  assert_int_equal (store_read (&store, &byte, 1, 2 * BLOCK - 1), 0);
  assert_int_equal (byte, 0);
  fail_calls_from (1, ENOSPC);
  assert_int_equal (store_set_aside (&store, 0, 3 * BLOCK), -1);
  assert_int_equal (errno, ENOSPC);
}

/* What is there does not.  Not every file system can do that, and then it says so. */
static void
range_is_made_zero (void **state)
{
  static char bytes[2 * BLOCK], got[2 * BLOCK];

  (void) state;
  memset (bytes, 'x', sizeof bytes);
  write_bytes (bytes, BLOCK, 0);
  fail_punches = true;
  assert_int_equal (store_zero_range (&store, 0, 2 * BLOCK), -1);
  assert_int_equal (errno, EOPNOTSUPP);
  fail_punches = false;
  fail_calls_from (1, ENOSPC);
  assert_int_equal (store_zero_range (&store, 0, 2 * BLOCK), -1);
  assert_int_equal (errno, ENOSPC);
  fail_calls_from (0, 0);
  if (store_zero_range (&store, 0, 2 * BLOCK) == -1) {
    assert_int_equal (errno, EOPNOTSUPP);
    return;
  }
  assert_true (bytes_used () >= 2 * BLOCK);
  memset (bytes, 0, sizeof bytes);
  assert_int_equal (store_read (&store, got, sizeof got, 0), 0);
  assert_memory_equal (got, bytes, sizeof got);
}

static void
file_gets_longer_and_shorter (void **state)
{
  uint64_t size;

  (void) state;
  write_bytes ("x", 1, 0);
  assert_int_equal (store_size (&store, &size), 0);
  assert_int_equal (size, 1);
  assert_int_equal (store_truncate (&store, 3 * BLOCK), 0);
  assert_int_equal (store_size (&store, &size), 0);
  assert_int_equal (size, 3 * BLOCK);
  assert_int_equal (store_truncate (&store, BLOCK), 0);
  assert_int_equal (store_size (&store, &size), 0);
  assert_int_equal (size, BLOCK);
  fail_truncates = true;
  assert_int_equal (store_truncate (&store, 0), -1);
  assert_int_equal (errno, EPERM);
}

static void
short_and_interrupted_transfers (void **state)
{
  char a[] = "Never lose an ", b[] = "", c[] = "acknowledged write";
  struct iovec iov[] = {
    { .iov_base = a, .iov_len = strlen (a) },
    { .iov_base = b, .iov_len = 0 },
    { .iov_base = c, .iov_len = strlen (c) },
  };
  char got[sizeof a + sizeof c];

  (void) state;
  short_transfers = true;
  assert_int_equal (store_writev (&store, iov, 3, BLOCK + 3), 0);
  assert_int_equal (
    store_read (&store, got, strlen (a) + strlen (c), BLOCK + 3), 0);
  assert_memory_equal (got, "Never lose an acknowledged write",
                       strlen (a) + strlen (c));
}

static void
errors_are_told (void **state)
{
  char byte = 'x';

  (void) state;
  fail_calls_from (1, ENOSPC);
  struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
  assert_int_equal (store_writev (&store, &iov, 1, BLOCK), -1);
  assert_int_equal (errno, ENOSPC);
  fail_calls_from (0, 0);
  /* Past the end of the file: somebody has cut it. */
  assert_int_equal (store_read (&store, &byte, 1, 5 * BLOCK), -1);
  assert_int_equal (errno, EIO);
}

static void
directories (void **state)
{
  const char *name;
  char *found;

  (void) state;
  setenv ("TMPDIR", dir, 1);
  found = tmpdir_find (&name);
  assert_non_null (found);
  assert_string_equal (name, dir);
  free (found);

  setenv ("TMPDIR", "/nonexistent/dir", 1);
  assert_null (tmpdir_find (&name));
  assert_int_equal (errno, ENOENT);
  assert_string_equal (name, "/nonexistent/dir");

  setenv ("TMPDIR", "", 1); /* means unset */
  found = tmpdir_find (&name);
  assert_string_equal (name, "/var/tmp");
  free (found);
}

#define WITH_STORE(test)                                                      \
  cmocka_unit_test_setup_teardown (test, set_up, tear_down)
#define WITH_FILE(test)                                                       \
  cmocka_unit_test_setup_teardown (test, set_up_file, tear_down)

int
main (void)
{
  const struct CMUnitTest tests[] = {
    WITH_STORE (file_is_made_once),
    WITH_STORE (file_without_tmpfile),
    WITH_STORE (directory_is_gone),
    WITH_FILE (copied_bytes),
    WITH_FILE (punched_bytes_are_given_back),
    WITH_FILE (punching_keeps_errno),
    WITH_FILE (space_is_set_aside),
    WITH_FILE (range_is_made_zero),
    WITH_FILE (file_gets_longer_and_shorter),
    WITH_FILE (short_and_interrupted_transfers),
    WITH_FILE (errors_are_told),
    cmocka_unit_test (directories),
  };

  const char *above = getenv ("TMPDIR");

  snprintf (dir, sizeof dir, "%s/test-store-XXXXXX", above ? above : "/tmp");
  if (!mkdtemp (dir)) {
    perror (dir);
    return 1;
  }
  const int failures
    = cmocka_run_group_tests_name ("store", tests, NULL, NULL);
  rmdir (dir);
  return failures;
}
