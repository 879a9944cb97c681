/* SPDX-License-Identifier: BSD-3-Clause */

/* The control socket: commands for the overlays of a running server.
 *
 * A command is a line of words.  The answer is lines of KEY=VALUE, then a line "ok" or
 * "error TEXT".
 */

#ifndef COW_CONTROL_H
#define COW_CONTROL_H

struct control;
struct overlays;

/* Make the socket PATH, which is absolute; a dead one is replaced.  NULL if that is not
 * possible, which was reported.
 */
extern struct control *control_new (const char *path,
                                    struct overlays *overlays);

/* Serve it, in a thread.  -1 and errno. */
extern int control_start (struct control *control);

/* Serve it no more, and remove the socket.  Waits for the command that is being done.
 * NULL is allowed.
 */
extern void control_free (struct control *control);

#endif /* COW_CONTROL_H */
