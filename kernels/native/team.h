/* How the native libraries share out work: see team.c. */
#include <stdint.h>

typedef void (*Task)(const void *args, int64_t piece);
typedef void (*TeamRun)(Task task, const void *args, int64_t pieces, int threads);

/* Pieces to cut `count` items into: enough that a thread which comes late, or is taken off its
 * core, leaves its share to the others. */
static inline int64_t pieces_of(int64_t count, int threads)
{
    const int64_t most = threads > 1 ? 8 * (int64_t)threads : 1;
    return count < most ? count : most;
}

/* First item of a piece; the piece ends where the next begins. */
static inline int64_t piece_begin(int64_t piece, int64_t pieces, int64_t count)
{
    return piece * count / pieces;
}
