/* SPDX-License-Identifier: BSD-3-Clause */

/* cowctl: the control socket of nbdkit-cow-filter for people (see cowctl(1)). */

#include <config.h>

#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define EXIT_USAGE 2

/* clang-format off */
static const char usage[] =
  "usage: cowctl [-s SOCKET] [--json] COMMAND [ARGUMENT...]\n"
  "\n"
  "  list [EXPORT]           exports and their moments\n"
  "  moment NAME EXPORT...   give the moment that is now a name, in all of them\n"
  "  forget NAME EXPORT...   forget the moment of that name, in all of them\n"
  "  drop EXPORT             throw away what was written to it, and its moments\n"
  "\n"
  "  -s, --socket=SOCKET     as given to the server with cow-control=SOCKET; else\n"
  "                          the environment variable COW_CONTROL says it\n"
  "      --json              for programs\n"
  "      --version, --help\n"
  "\n"
  "The default export is called \"default\".\n";
/* clang-format on */

static void __attribute__ ((noreturn, format (printf, 1, 2)))
die (const char *fs, ...)
{
  va_list args;

  (void) fputs ("cowctl: ", stderr);
  va_start (args, fs);
  (void) vfprintf (stderr, fs, args);
  va_end (args);
  (void) fputc ('\n', stderr);
  exit (EXIT_FAILURE);
}

/* A stream in both directions. */
static FILE *
connect_to (const char *path)
{
  struct sockaddr_un address = { .sun_family = AF_UNIX };
  const int fd = socket (AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  FILE *stream;

  if (strlen (path) >= sizeof address.sun_path)
    die ("%s: the name of a socket can have no more than %zu bytes", path,
         sizeof address.sun_path - 1);
  memcpy (address.sun_path, path, strlen (path) + 1);
  if (fd == -1
      || connect (fd, (const struct sockaddr *) &address, sizeof address)
           == -1)
    die ("%s: cannot connect: %s; is a server running with "
         "cow-control=%s?",
         path, strerror (errno), path);
  stream = fdopen (fd, "r+");
  if (!stream)
    die ("%s", strerror (errno));
  return stream;
}

/* Send a word; what would end it is percent-encoded. */
static void
send_word (FILE *stream, const char *word)
{
  for (; *word; ++word)
    if ((unsigned char) *word <= ' ' || *word == 0x7f)
      (void) fprintf (stream, "%%%02X", (unsigned char) *word);
    else
      (void) fputc (*word, stream);
}

static void
send_command (FILE *stream, char *const *words)
{
  for (char *const *word = words; *word; ++word)
    if (**word == '\0')
      die ("a word of the command is empty; the default export is called "
           "\"default\"");
  for (; *words; ++words) {
    send_word (stream, *words);
    (void) fputc (words[1] ? ' ' : '\n', stream);
  }
  if (fflush (stream) != 0)
    die ("the server does not take the command: %s", strerror (errno));
}

/*----------------------------------------------------------------------
 * The answer
 */

/* A line of it: KEY=VALUE, in TEXT. */
struct line {
  char *key, *value;
};

struct answer {
  struct line *lines;
  size_t count;
};

/* Read all of it; ends the program if it is an error. */
static struct answer
receive (FILE *stream)
{
  struct answer a = { .count = 0 };

  for (;;) {
    char *text = NULL, *equals;
    size_t size = 0;
    const ssize_t n = getline (&text, &size, stream);

    if (n <= 0 || text[n - 1] != '\n')
      die ("the server has closed the connection; its log may say why");
    text[n - 1] = '\0';
    if (strcmp (text, "ok") == 0) {
      free (text);
      return a;
    }
    if (strncmp (text, "error ", 6) == 0)
      die ("%s", text + 6);
    equals = strchr (text, '=');
    if (!equals)
      die ("this is no answer of nbdkit-cow-filter: %s", text);
    *equals = '\0';
    a.lines = realloc (a.lines, (a.count + 1) * sizeof *a.lines);
    if (!a.lines)
      die ("out of memory");
    a.lines[a.count++] = (struct line) { .key = text, .value = equals + 1 };
  }
}

static bool
is (const struct line *l, const char *key)
{
  return strcmp (l->key, key) == 0;
}

static void
print_json_string (const char *text)
{
  (void) putchar ('"');
  for (; *text; ++text) {
    if (*text == '"' || *text == '\\')
      (void) putchar ('\\');
    (void) putchar (*text);
  }
  (void) putchar ('"');
}

/* An array of exports, each of which has an array of moments. */
static void
print_json (const struct answer *a)
{
  bool in_export = false, in_moment = false;

  (void) putchar ('[');
  for (size_t i = 0; i < a->count; ++i) {
    const struct line *l = &a->lines[i];

    if (is (l, "export")) {
      (void) printf ("%s{", !in_export ? "" : in_moment ? "}]}," : "]},");
      in_export = true;
      in_moment = false;
    }
    else if (is (l, "moment")) {
      (void) fputs (in_moment ? "},{" : "{", stdout);
      in_moment = true;
    }
    else
      (void) putchar (',');
    print_json_string (l->key);
    (void) putchar (':');
    if (is (l, "export") || is (l, "moment") || is (l, "made"))
      print_json_string (l->value);
    else
      (void) fputs (l->value, stdout);
    /* The last of what belongs to the export itself. */
    if (is (l, "connections"))
      (void) fputs (",\"moments\":[", stdout);
  }
  (void) puts (!in_export ? "]" : in_moment ? "}]}]" : "]}]");
}

/* A table, a line for each export and for each moment. */
static void
print_table (const struct answer *a)
{
  static const char row[] = "%-24s %-24s %16s %12s\n";
  const char *export = "", *moment = "", *size = "", *made = "";

  if (a->count > 0)
    (void) printf (row, "EXPORT", "MOMENT", "BYTES", "CONNECTIONS");
  for (size_t i = 0; i < a->count; ++i) {
    const struct line *l = &a->lines[i];

    if (is (l, "export"))
      export = l->value;
    else if (is (l, "size"))
      size = l->value;
    else if (is (l, "connections"))
      (void) printf (row, export, "", size, l->value);
    else if (is (l, "moment"))
      moment = l->value;
    else if (is (l, "made"))
      made = l->value;
    else if (is (l, "taken"))
      (void) printf ("%-24s %-24s %16s %s\n", "", moment, l->value, made);
  }
}

int
main (int argc, char **argv)
{
  static const struct option options[] = {
    { "socket", required_argument, NULL, 's' },
    { "json", no_argument, NULL, 'j' },
    { "help", no_argument, NULL, 'h' },
    { "version", no_argument, NULL, 'v' },
    { NULL, 0, NULL, 0 },
  };
  const char *path = getenv ("COW_CONTROL");
  bool json = false;
  int o;

  /* The arguments of a command may look like options. */
  while ((o = getopt_long (argc, argv, "+s:h", options, NULL)) != -1)
    switch (o) {
    case 's':
      path = optarg;
      break;
    case 'j':
      json = true;
      break;
    case 'h':
      (void) fputs (usage, stdout);
      return 0;
    case 'v':
      (void) puts ("cowctl " PACKAGE_VERSION);
      return 0;
    default:
      (void) fputs (usage, stderr);
      return EXIT_USAGE;
    }
  if (optind == argc) {
    (void) fputs (usage, stderr);
    return EXIT_USAGE;
  }
  if (!path || *path == '\0')
    die ("which server?  Give -s SOCKET, or set COW_CONTROL");

  (void) signal (SIGPIPE, SIG_IGN); /* die says it */

  FILE *stream = connect_to (path);

  send_command (stream, argv + optind);
  const struct answer a = receive (stream);

  if (json)
    print_json (&a);
  else
    print_table (&a);
  if (fflush (stdout) != 0)
    die ("cannot write: %s", strerror (errno));
  return 0;
}
