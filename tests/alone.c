/* nbdkit-cow-filter
 * Copyright (C) 2026 The nbdkit-cow-filter authors
 * SPDX-License-Identifier: BSD-3-Clause
 */

/* alone COMMAND [ARGUMENT...]: runs a test away from everything else.
 *
 * The test gets a session of its own and no standard input, so no program in it can
 * wait for the terminal or be stopped by it.  It gets a directory for its temporary
 * files, which is removed, and where that is allowed a mount namespace, which goes with
 * its last process.
 *
 * A test that hangs ends: after $TEST_LIMIT seconds (900) it has failed, and what it was
 * running is named.
 *
 * Nothing of the test outlives it.  What it leaves running is killed, and named, and the
 * test has failed.  When this program is told to end (Ctrl-C, or the death of who started
 * it), it tells all that the test has started; what has not ended soon is killed.
 *
 * The exit status is that of the test.
 */

#include <config.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* How long a test may take, unless $TEST_LIMIT says something else. */
#define LIMIT_S 900
/* How long the test may take to end, once it was told. */
#define GRACE_MS 1500
/* How long what it has started may take to end, once the test has ended. */
#define LINGER_MS 3000

#define MAX_PROCESSES 4096

static sigset_t signals; /* what this program waits for */
static int test_status = -1;
static pid_t test;

static void
fail (const char *what)
{
  fprintf (stderr, "alone: %s: %s\n", what, strerror (errno));
  exit (EXIT_FAILURE);
}

/* In the child: become the test. */
static void
run_test (char *argv[], const sigset_t *mask)
{
  int null = open ("/dev/null", O_RDONLY);

  if (null == -1 || dup2 (null, STDIN_FILENO) == -1)
    fail ("/dev/null");
  close (null);
  setsid ();
  /* In a chroot, / need not be a mount point.  Then it is as where this is not allowed. */
  if (unshare (CLONE_NEWNS) == 0
      && mount (NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == -1
      && errno != EINVAL)
    fail ("private mounts");
  sigprocmask (SIG_SETMASK, mask, NULL);
  execvp (argv[0], argv);
  fail (argv[0]);
}

/* The parent of a process, or 0 where there is none any more, or it has ended and
 * nobody has asked yet how.
 */
static pid_t
parent_of (pid_t pid)
{
  char name[64], line[512], *end, state;
  FILE *file;
  int parent;

  snprintf (name, sizeof name, "/proc/%d/stat", pid);
  file = fopen (name, "r");
  if (!file)
    return 0;
  /* A process may have any name, in parentheses. */
  end = fgets (line, sizeof line, file) ? strrchr (line, ')') : NULL;
  fclose (file);
  if (!end || sscanf (end, ") %c %d", &state, &parent) != 2 || state == 'Z')
    return 0;
  return parent;
}

/* Adds to found[n...] all processes below this one, each behind its parent; returns how
 * many found has then.
 */
static int
find_below (pid_t above, pid_t found[MAX_PROCESSES], int n)
{
  DIR *proc = opendir ("/proc");
  struct dirent *entry;

  if (!proc)
    fail ("/proc");
  while (n < MAX_PROCESSES && (entry = readdir (proc))) {
    pid_t pid = atoi (entry->d_name);

    if (pid > 0 && parent_of (pid) == above) {
      found[n] = pid;
      n = find_below (pid, found, n + 1);
    }
  }
  closedir (proc);
  return n;
}

/* Sends a signal to all that the test has started and that has not ended. */
static void
signal_all (int signal)
{
  pid_t found[MAX_PROCESSES];
  int n = find_below (getpid (), found, 0);

  for (int i = 0; i < n; i++)
    kill (found[i], signal);
  /* Who is stopped cannot end. */
  for (int i = 0; i < n; i++)
    kill (found[i], SIGCONT);
}

/* Says of each process that the test has started what it is. */
static void
name_all (const char *what)
{
  pid_t found[MAX_PROCESSES];
  int n = find_below (getpid (), found, 0);

  for (int i = 0; i < n; i++) {
    char name[64], line[512];
    FILE *file;
    size_t length;

    snprintf (name, sizeof name, "/proc/%d/cmdline", found[i]);
    file = fopen (name, "r");
    length = file ? fread (line, 1, sizeof line - 1, file) : 0;
    if (file)
      fclose (file);
    for (size_t at = 0; at < length; at++)
      if (line[at] == '\0')
        line[at] = ' ';
    line[length] = '\0';
    fprintf (stderr, "alone: FAILED: %s: %d %s\n", what, found[i], line);
  }
}

/* Takes note of what has ended; returns whether anything is left.  (As the subreaper,
 * this process inherits what the test has put into the background.)
 */
static bool
anything_left (void)
{
  pid_t pid;
  int status;

  while ((pid = waitpid (-1, &status, WNOHANG)) > 0)
    if (pid == test)
      test_status
        = WIFEXITED (status) ? WEXITSTATUS (status) : 128 + WTERMSIG (status);
  return pid == 0;
}

static time_t
now (void)
{
  struct timespec t;

  clock_gettime (CLOCK_MONOTONIC, &t);
  return t.tv_sec;
}

/* Waits for a signal to this process, and returns it; SIGALRM when it is too late. */
static int
next_signal (time_t end)
{
  int signal;

  do {
    const time_t at = now ();
    const struct timespec left = { .tv_sec = at < end ? end - at : 0 };

    signal = sigtimedwait (&signals, NULL, &left);
  } while (signal == -1 && errno == EINTR);
  return signal == -1 ? SIGALRM : signal;
}

/* Waits until nothing is left, for so long at the most; returns whether that is so. */
static bool
all_ended (int ms)
{
  const struct timespec pause = { .tv_nsec = 10 * 1000 * 1000 };

  for (int waited = 0; anything_left (); waited += 10) {
    if (waited >= ms)
      return false;
    nanosleep (&pause, NULL);
  }
  return true;
}

/* The directory for temporary files. */
static char dir[4096];

static void
make_dir (void)
{
  const char *above = getenv ("TMPDIR");

  snprintf (dir, sizeof dir, "%s/cow.XXXXXX",
            above && *above ? above : "/tmp");
  /* Some tests run a server as somebody else. */
  if (!mkdtemp (dir) || chmod (dir, 0711) == -1)
    fail (dir);
  setenv ("TMPDIR", dir, 1);
}

static void
remove_dir (void)
{
  pid_t pid = fork ();

  if (pid == 0) {
    execlp ("rm", "rm", "-rf", "--one-file-system", dir, NULL);
    _exit (127);
  }
  waitpid (pid, NULL, 0);
}

int
main (int argc, char *argv[])
{
  const int ends[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT };
  const char *limit = getenv ("TEST_LIMIT");
  const time_t end
    = now () + (limit && atoi (limit) > 0 ? atoi (limit) : LIMIT_S);
  sigset_t mask;
  int signal = 0;

  if (argc < 2) {
    fprintf (stderr, "usage: alone COMMAND [ARGUMENT...]\n");
    return EXIT_FAILURE;
  }
  sigemptyset (&signals);
  sigaddset (&signals, SIGCHLD);
  for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++)
    sigaddset (&signals, ends[i]);
  sigprocmask (SIG_BLOCK, &signals, &mask);
  if (prctl (PR_SET_CHILD_SUBREAPER, 1) == -1
      || prctl (PR_SET_PDEATHSIG, SIGTERM) == -1)
    fail ("prctl");

  make_dir ();
  test = fork ();
  if (test == -1)
    fail ("fork");
  if (test == 0)
    run_test (&argv[1], &mask);

  do {
    signal = next_signal (end);
    anything_left ();
  } while (signal == SIGCHLD && test_status == -1);

  if (signal != SIGCHLD) {
    if (signal == SIGALRM)
      name_all ("it takes too long");
    signal_all (SIGTERM);
    all_ended (GRACE_MS);
    test_status = 128 + signal;
  }
  else if (!all_ended (LINGER_MS)) {
    name_all ("left running");
    test_status = EXIT_FAILURE;
  }
  while (!all_ended (10))
    signal_all (SIGKILL);
  remove_dir ();
  return test_status;
}
