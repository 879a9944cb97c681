/* SPDX-License-Identifier: BSD-3-Clause */

/* The control socket (see control.h).
 *
 * One thread serves all clients, one command after the other, and waits for none of them:
 * it reads from a client only when that has taken all of the last answer, and no more than
 * a line at a time.
 */

#include <config.h>

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <nbdkit-filter.h>

#include "common/cleanup.h"
#include "common/clock.h"
#include "common/debug.h"
#include "server/control.h"
#include "server/moments.h"
#include "server/names.h"

#define MAX_CLIENTS 64
#define MAX_LINE (1 << 20)

/* After an accept that failed, as there are no descriptors, for example. */
#define PAUSE_MS 1000

struct client {
  int fd; /* -1: nobody */
  char *line;
  size_t length; /* of what was read of it */
  char *answer;  /* NULL: none is under way */
  size_t answer_length, sent;
  bool ends;     /* when the answer is sent */
  int64_t heard; /* of it last: clock_now */
};

struct control {
  struct overlays *overlays; /* constant, as are the next four */
  char *path;
  int socket, end;  /* what can be read of END tells the thread to end */
  struct stat stat; /* of the socket in the file system */
  bool started;
  pthread_t thread;
  struct client clients[MAX_CLIENTS]; /* for the thread alone */
};

/*----------------------------------------------------------------------
 * Commands
 */

/* The words of a line. */
struct words {
  char **list;
  size_t count;
};

static int
out_of_memory (struct refusal *refusal)
{
  (void) snprintf (refusal->text, sizeof refusal->text, "out of memory");
  return -1;
}

static int
wrong_words (struct refusal *refusal, const char *usage)
{
  (void) snprintf (refusal->text, sizeof refusal->text, "this is: %s", usage);
  return -1;
}

/* Names of exports from word FIRST on are decoded, in place. */
static int
decode_exports (const struct words *words, size_t first,
                struct refusal *refusal)
{
  for (size_t i = first; i < words->count; ++i)
    if (names_decode (words->list[i]) == -1) {
      (void) snprintf (refusal->text, sizeof refusal->text,
                       "%s: after %% come two hexadecimal digits, not both 0",
                       printable (words->list[i]).text);
      return -1;
    }
  return 0;
}

typedef int command (struct overlays *overlays, const struct words *words,
                     FILE *answer, struct refusal *refusal);

static int
do_list (struct overlays *overlays, const struct words *words, FILE *answer,
         struct refusal *refusal)
{
  if (words->count > 2)
    return wrong_words (refusal, "list [EXPORT]");
  if (decode_exports (words, 1, refusal) == -1)
    return -1;
  return moments_describe (overlays, words->count == 2 ? words->list[1] : NULL,
                           answer, refusal);
}

static int
do_moment (struct overlays *overlays, const struct words *words, FILE *answer,
           struct refusal *refusal)
{
  (void) answer;
  if (words->count < 3)
    return wrong_words (refusal, "moment NAME EXPORT...");
  if (decode_exports (words, 2, refusal) == -1)
    return -1;
  return moments_make (overlays, words->list[1], words->list + 2,
                       words->count - 2, refusal);
}

static int
do_forget (struct overlays *overlays, const struct words *words, FILE *answer,
           struct refusal *refusal)
{
  (void) answer;
  if (words->count < 3)
    return wrong_words (refusal, "forget NAME EXPORT...");
  if (decode_exports (words, 2, refusal) == -1)
    return -1;
  return moments_forget (overlays, words->list[1], words->list + 2,
                         words->count - 2, refusal);
}

static int
do_drop (struct overlays *overlays, const struct words *words, FILE *answer,
         struct refusal *refusal)
{
  (void) answer;
  if (words->count != 2)
    return wrong_words (refusal, "drop EXPORT");
  if (decode_exports (words, 1, refusal) == -1)
    return -1;
  return moments_drop (overlays, words->list[1], refusal);
}

static const struct {
  const char *name;
  command *function;
} commands[] = {
  { "list", do_list },
  { "moment", do_moment },
  { "forget", do_forget },
  { "drop", do_drop },
};
#define NR_COMMANDS (sizeof commands / sizeof commands[0])

/* Cut LINE into words.  -1 and ENOMEM. */
static int
split (char *line, struct words *words)
{
  char *save, *word;

  words->count = 0;
  words->list = malloc ((strlen (line) / 2 + 1) * sizeof *words->list);
  if (!words->list)
    return -1;
  for (word = strtok_r (line, " \t\r", &save); word;
       word = strtok_r (NULL, " \t\r", &save))
    words->list[words->count++] = word;
  return 0;
}

static int
run_words (struct overlays *overlays, const struct words *words, FILE *answer,
           struct refusal *refusal)
{
  const char *name = words->count > 0 ? words->list[0] : "";

  for (size_t i = 0; i < NR_COMMANDS; ++i)
    if (strcmp (name, commands[i].name) == 0)
      return commands[i].function (overlays, words, answer, refusal);
  (void) snprintf (
    refusal->text, sizeof refusal->text,
    "\"%s\" is no command; there are list, moment, forget and drop",
    printable (name).text);
  return -1;
}

/* Do what LINE says, and write the answer. */
static void
run_line (struct overlays *overlays, char *line, FILE *answer)
{
  struct words words;
  struct refusal refusal;
  int r = split (line, &words);

  if (r == -1)
    (void) out_of_memory (&refusal);
  else
    r = run_words (overlays, &words, answer, &refusal);
  if (r == 0)
    (void) fputs ("ok\n", answer);
  else
    (void) fprintf (answer, "error %s\n", refusal.text);
  free (words.list);
}

/*----------------------------------------------------------------------
 * Clients
 */

static void
drop_client (struct client *c)
{
  close (c->fd);
  free (c->line);
  free (c->answer);
  *c = (struct client) { .fd = -1 };
}

/* Have the client wait for an answer to LINE; NULL: it was no line. */
static void
answer (struct client *c, struct overlays *overlays, char *line)
{
  FILE *stream = open_memstream (&c->answer, &c->answer_length);

  if (!stream) {
    drop_client (c);
    return;
  }
  if (line)
    run_line (overlays, line, stream);
  else
    (void) fprintf (stream,
                    "error a line has no more than %d bytes, none of "
                    "them 0\n",
                    MAX_LINE - 1);
  if (fclose (stream) != 0 || !c->answer) /* there was no memory */
    drop_client (c);
}

/* Do what the first line says that was read, if it is whole. */
static void
take_line (struct client *c, struct overlays *overlays)
{
  char *end = memchr (c->line, '\n', c->length);

  if (!end && c->length < MAX_LINE)
    return;
  if (!end || memchr (c->line, '\0', (size_t) (end - c->line))) {
    c->ends = true;
    answer (c, overlays, NULL);
    return;
  }

  CLEANUP_FREE char *line = strndup (c->line, (size_t) (end - c->line));

  if (!line) {
    drop_client (c);
    return;
  }
  c->length -= (size_t) (end + 1 - c->line);
  memmove (c->line, end + 1, c->length);
  answer (c, overlays, line);
}

static void
read_client (struct client *c, struct overlays *overlays)
{
  const ssize_t n
    = recv (c->fd, c->line + c->length, MAX_LINE - c->length, MSG_DONTWAIT);

  if (n > 0) {
    c->heard = clock_now ();
    c->length += (size_t) n;
    take_line (c, overlays);
  }
  else if (n == 0 || (errno != EAGAIN && errno != EINTR))
    drop_client (c);
}

static void
write_client (struct client *c, struct overlays *overlays)
{
  const ssize_t n
    = send (c->fd, c->answer + c->sent, c->answer_length - c->sent,
            MSG_DONTWAIT | MSG_NOSIGNAL);

  if (n == -1) {
    if (errno != EAGAIN && errno != EINTR)
      drop_client (c);
    return;
  }
  c->sent += (size_t) n;
  if (c->sent < c->answer_length)
    return;
  free (c->answer);
  c->answer = NULL;
  c->sent = 0;
  if (c->ends)
    drop_client (c);
  else
    take_line (c, overlays); /* the next one may have been read already */
}

/* Room for a client: where there is none, the one goes that was silent for the longest time.
 * NULL: all wait for answers.
 */
static struct client *
find_room (struct control *control)
{
  struct client *silent = NULL;

  for (unsigned i = 0; i < MAX_CLIENTS; ++i) {
    struct client *c = &control->clients[i];

    if (c->fd == -1)
      return c;
    if (!c->answer && (!silent || c->heard < silent->heard))
      silent = c;
  }
  if (silent)
    drop_client (silent);
  return silent;
}

/* False if that is to be tried again only after a while. */
static bool
accept_client (struct control *control)
{
  const int fd = accept4 (control->socket, NULL, NULL, SOCK_CLOEXEC);
  struct client *c = fd == -1 ? NULL : find_room (control);

  if (!c) {
    if (fd != -1)
      close (fd);
    return false;
  }
  *c = (struct client) {
    .fd = fd,
    .line = malloc (MAX_LINE),
    .heard = clock_now (),
  };
  if (!c->line)
    drop_client (c);
  return true;
}

/* One thing after the other, until there is to be an end. */
static void *
serve (void *opaque)
{
  struct control *control = opaque;
  struct pollfd fds[2 + MAX_CLIENTS];
  bool accepts = true;

  for (;;) {
    fds[0] = (struct pollfd) { .fd = control->end, .events = POLLIN };
    fds[1] = (struct pollfd) { .fd = accepts ? control->socket : -1,
                               .events = POLLIN };
    for (unsigned i = 0; i < MAX_CLIENTS; ++i) {
      const struct client *c = &control->clients[i];

      fds[2 + i] = (struct pollfd) { .fd = c->fd,
                                     .events = c->answer ? POLLOUT : POLLIN };
    }
    if (poll (fds, 2 + MAX_CLIENTS, accepts ? -1 : PAUSE_MS) == -1) {
      if (errno != EINTR)
        (void) usleep (1000 * PAUSE_MS); /* no memory, for example */
      continue;
    }
    if (fds[0].revents)
      return NULL;
    for (unsigned i = 0; i < MAX_CLIENTS; ++i) {
      struct client *c = &control->clients[i];

      if (!fds[2 + i].revents)
        continue;
      if (c->answer)
        write_client (c, control->overlays);
      else
        read_client (c, control->overlays);
    }
    accepts = !fds[1].revents || accept_client (control);
  }
}

/*----------------------------------------------------------------------
 * The socket
 */

/* Is there a socket at ADDRESS that nobody listens on? */
static bool
is_dead_socket (const struct sockaddr_un *address)
{
  struct stat st;
  /* (One that is in use may have no room for a client, which is not waited for.) */
  const int fd
    = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  bool dead = false;

  if (fd == -1)
    return false;
  if (lstat (address->sun_path, &st) == 0 && S_ISSOCK (st.st_mode)
      && connect (fd, (const struct sockaddr *) address, sizeof *address)
           == -1)
    dead = errno == ECONNREFUSED;
  close (fd);
  return dead;
}

/* -1, which was reported. */
static int
make_socket (struct control *control)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  const struct sockaddr *generic = (const struct sockaddr *) &address;
  int r;

  if (strlen (control->path) >= sizeof address.sun_path) {
    nbdkit_error ("cow-control=%s: the name of a socket can have no more than "
                  "%zu bytes",
                  control->path, sizeof address.sun_path - 1);
    return -1;
  }
  memcpy (address.sun_path, control->path, strlen (control->path) + 1);
  control->socket
    = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  /* What is made in the file system gets this mode. */
  if (control->socket == -1
      || fchmod (control->socket, S_IRUSR | S_IWUSR) == -1) {
    nbdkit_error ("cow-control=%s: cannot make a socket: %m", control->path);
    return -1;
  }
  r = bind (control->socket, generic, sizeof address);
  if (r == -1 && errno == EADDRINUSE && is_dead_socket (&address)
      && unlink (control->path) == 0)
    r = bind (control->socket, generic, sizeof address);
  if (r == -1 && errno == EADDRINUSE) {
    nbdkit_error (
      "cow-control=%s: there is something of that name, which is no "
      "dead socket; remove it, or name another socket",
      control->path);
    return -1;
  }
  if (r == -1 || lstat (control->path, &control->stat) == -1
      || listen (control->socket, MAX_CLIENTS) == -1) {
    nbdkit_error ("cow-control=%s: cannot make the socket: %m", control->path);
    return -1;
  }
  return 0;
}

struct control *
control_new (const char *path, struct overlays *overlays)
{
  struct control *control = calloc (1, sizeof *control);

  if (!control || !(control->path = strdup (path))) {
    nbdkit_error ("cow: out of memory");
    free (control);
    return NULL;
  }
  control->overlays = overlays;
  control->socket = control->end = -1;
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    control->clients[i].fd = -1;
  if (make_socket (control) == -1) {
    control_free (control);
    return NULL;
  }
  return control;
}

int
control_start (struct control *control)
{
  sigset_t all, old;
  int err;

  control->end = eventfd (0, EFD_CLOEXEC);
  if (control->end == -1)
    return -1;
  /* Signals are for nbdkit's own threads. */
  sigfillset (&all);
  pthread_sigmask (SIG_SETMASK, &all, &old);
  err = pthread_create (&control->thread, NULL, serve, control);
  pthread_sigmask (SIG_SETMASK, &old, NULL);
  if (err) {
    errno = err;
    return -1;
  }
  control->started = true;
  return 0;
}

void
control_free (struct control *control)
{
  const uint64_t one = 1;
  struct stat st;

  if (!control)
    return;
  if (control->started) {
    while (write (control->end, &one, sizeof one) == -1 && errno == EINTR)
      ;
    pthread_join (control->thread, NULL);
  }
  for (unsigned i = 0; i < MAX_CLIENTS; ++i)
    if (control->clients[i].fd != -1)
      drop_client (&control->clients[i]);
  if (control->socket != -1)
    close (control->socket);
  if (control->end != -1)
    close (control->end);
  /* If it is still the one that was made. */
  if (control->stat.st_ino != 0 && lstat (control->path, &st) == 0
      && st.st_dev == control->stat.st_dev
      && st.st_ino == control->stat.st_ino)
    (void) unlink (control->path);
  free (control->path);
  free (control);
}
