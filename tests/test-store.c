/* SPDX-License-Identifier: BSD-3-Clause */

/* The overlay file and its places without a server. */

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
#include "overlay/places.h"
#include "server/tmpdir.h"

#define PLACE UINT64_C (131072)

static char dir[4096];
static struct store store;
static struct places places;

static int
set_up (void **state)
{
  (void) state;
  store_init (&store, dir, NEWFILE_ANONYMOUS, STORE_WRITES_BACK_LATE);
  places_init (&places, &store, PLACE, 1);
  return 0;
}

static int
tear_down (void **state)
{
  (void) state;
  places_destroy (&places);
  store_destroy (&store);
  fail_calls_from (0, 0);
  short_transfers = fail_punches = no_tmpfile = false;
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
file_is_made_at_the_first_place (void **state)
{
  uint64_t place;
  struct stat st;

  (void) state;
  assert_int_equal (store.file.fd, -1);
  assert_int_equal (places_take (&places, 1, &place), 1);
  assert_int_equal (place, 1);
  assert_int_equal (fstat (store.file.fd, &st), 0);
  assert_int_equal (st.st_nlink, 0);
  assert_int_equal (st.st_mode & 0777, 0600);
  assert_true (fcntl (store.file.fd, F_GETFD) & FD_CLOEXEC);
}

static void
file_without_tmpfile (void **state)
{
  no_tmpfile = true;
  file_is_made_at_the_first_place (state);
  assert_int_equal (rmdir (dir), 0); /* nothing is left in it */
  assert_int_equal (mkdir (dir, 0700), 0);
}

static void
places_come_in_order (void **state)
{
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 3, &place), 3);
  assert_int_equal (place, 1);
  assert_int_equal (places_take (&places, 2, &place), 2);
  assert_int_equal (place, 4);
}

static void
places_given_back_are_given_out_again (void **state)
{
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 10, &place), 10);
  places_give_back (&places, 3, 2);
  places_give_back (&places, 7, 1);
  /* The first ones of the file first, in runs. */
  assert_int_equal (places_take (&places, 5, &place), 2);
  assert_int_equal (place, 3);
  assert_int_equal (places_take (&places, 1, &place), 1);
  assert_int_equal (place, 7);
  assert_int_equal (places_take (&places, 1, &place), 1);
  assert_int_equal (place, 11);
  /* The last one: the end moves back. */
  places_give_back (&places, 11, 1);
  assert_int_equal (places_take (&places, 4, &place), 4);
  assert_int_equal (place, 11);
}

/* Behind many others too, and the end moves back over all that are free. */
static void
many_places_given_back (void **state)
{
  const uint64_t nr = 1000;
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, nr, &place), nr);
  for (uint64_t i = 1; i < nr; i += 2)
    places_give_back (&places, place + i - 1, 1);
  for (uint64_t i = 1; i < nr; i += 2) {
    assert_int_equal (places_take (&places, nr, &place), 1);
    assert_int_equal (place, i);
  }
  for (uint64_t i = 1; i < nr; ++i)
    places_give_back (&places, i, 1);
  assert_int_equal (places_end (&places), (nr + 1) * PLACE);
  places_give_back (&places, nr, 1);
  assert_int_equal (places_end (&places), PLACE);
}

static void
copied_bytes (void **state)
{
  static char bytes[PLACE], copy[PLACE];
  uint64_t place;

  (void) state;
  for (size_t i = 0; i < sizeof bytes; ++i)
    bytes[i] = (char) (i / 3);
  assert_int_equal (places_take (&places, 2, &place), 2);
  write_bytes (bytes, sizeof bytes, PLACE);
  short_transfers = true;
  assert_int_equal (store_copy (&store, PLACE, 2 * PLACE, PLACE), 0);
  short_transfers = false;
  assert_int_equal (store_read (&store, copy, PLACE, 2 * PLACE), 0);
  assert_memory_equal (copy, bytes, PLACE);
  fail_calls_from (1, ENOSPC);
  assert_int_equal (store_copy (&store, PLACE, 2 * PLACE, PLACE), -1);
  assert_int_equal (call_has_failed (), ENOSPC);
}

static void
giving_back_without_memory (void **state)
{
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 3, &place), 3);
  fail_calls_from (1, ENOMEM);
  places_give_back (&places, 1, 1);
  assert_int_equal (call_has_failed (), ENOMEM);
  assert_int_equal (places_take (&places, 1, &place), 1);
  assert_int_equal (place, 4); /* lost, not given out twice */
}

static void
given_back_means_punched (void **state)
{
  static char bytes[PLACE];
  uint64_t place;

  (void) state;
  memset (bytes, 'x', sizeof bytes);
  assert_int_equal (places_take (&places, 2, &place), 2);
  write_bytes (bytes, sizeof bytes, PLACE);
  assert_true (bytes_used () >= PLACE);
  places_give_back (&places, 1, 1);
  assert_true (bytes_used () < PLACE);
}

static void
no_place_beyond_the_longest_file (void **state)
{
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 1, &place), 1);
  const uint64_t most = INT64_MAX / PLACE - 1;
  assert_true (places_take (&places, UINT64_MAX, &place) == most - 1);
  assert_true ((place + most - 1) * PLACE <= INT64_MAX);
  errno = 0;
  assert_int_equal (places_take (&places, 1, &place), 0);
  assert_int_equal (errno, EFBIG);
}

static void
places_in_a_row_or_none (void **state)
{
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 3, &place), 3);
  places_give_back (&places, 1, 2);
  assert_int_equal (places_take_row (&places, 2, &place), 0);
  assert_int_equal (place, 4);
  assert_int_equal (places_take_row (&places, UINT64_MAX, &place), -1);
  assert_int_equal (errno, EFBIG);
  assert_int_equal (places_end (&places), 6 * PLACE);
}

static void
directory_is_gone (void **state)
{
  uint64_t place;

  (void) state;
  assert_int_equal (rmdir (dir), 0);
  assert_int_equal (places_take (&places, 1, &place), 0);
  assert_int_equal (errno, ENOENT);
  assert_int_equal (mkdir (dir, 0700), 0);
  assert_int_equal (places_take (&places, 1, &place), 1);
  assert_int_equal (place, 1);
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
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 1, &place), 1);
  short_transfers = true;
  assert_int_equal (store_writev (&store, iov, 3, PLACE + 3), 0);
  assert_int_equal (
    store_read (&store, got, strlen (a) + strlen (c), PLACE + 3), 0);
  assert_memory_equal (got, "Never lose an acknowledged write",
                       strlen (a) + strlen (c));
}

static void
errors_are_told (void **state)
{
  char byte = 'x';
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 1, &place), 1);
  fail_calls_from (1, ENOSPC);
  struct iovec iov = { .iov_base = &byte, .iov_len = 1 };
  assert_int_equal (store_writev (&store, &iov, 1, PLACE), -1);
  assert_int_equal (errno, ENOSPC);
  fail_calls_from (0, 0);
  /* Past the end of the file: somebody has cut it. */
  assert_int_equal (store_read (&store, &byte, 1, 5 * PLACE), -1);
  assert_int_equal (errno, EIO);
}

static void
punching_keeps_errno (void **state)
{
  uint64_t place;

  (void) state;
  assert_int_equal (places_take (&places, 1, &place), 1);
  fail_punches = true;
  errno = ENOSPC;
  store_punch (&store, PLACE, PLACE);
  assert_int_equal (errno, ENOSPC);
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

int
main (void)
{
  const struct CMUnitTest tests[] = {
    WITH_STORE (file_is_made_at_the_first_place),
    WITH_STORE (file_without_tmpfile),
    WITH_STORE (places_come_in_order),
    WITH_STORE (places_given_back_are_given_out_again),
    WITH_STORE (many_places_given_back),
    WITH_STORE (copied_bytes),
    WITH_STORE (giving_back_without_memory),
    WITH_STORE (given_back_means_punched),
    WITH_STORE (no_place_beyond_the_longest_file),
    WITH_STORE (places_in_a_row_or_none),
    WITH_STORE (directory_is_gone),
    WITH_STORE (short_and_interrupted_transfers),
    WITH_STORE (errors_are_told),
    WITH_STORE (punching_keeps_errno),
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
