/* Threads that share the pieces of a task with their caller.
 *
 * A decode step is a hundred tasks of 20 to 200 microseconds. An OpenMP region ends when every
 * thread has been there: on a machine with other work, a thread that has lost its core holds up
 * all others for a whole time slice, a hundred times a step. Here the caller takes pieces like
 * everybody else and waits only for pieces that have been begun, so that a helper which is asleep
 * or off its core costs its help and nothing more.
 *
 * There is one job at a time, and one word says all about it: `ticket` is its number << 32 | the
 * pieces nobody has taken. Taking one is a compare-and-swap of that word, which also proves that
 * the job read before it is still the current one. A caller that finds the team busy does its
 * pieces alone.
 */
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#include "team.h"

#define MOST_HELPERS 255
#define LINE 128                /* bytes that cores pass around as one, with their neighbour */
#define AWAKE_NS 100000         /* a helper without work looks for more so long, then sleeps */
#define LEFT UINT64_C(0xffffffff)

static struct {
    _Alignas(LINE) _Atomic uint64_t ticket;
    _Atomic(Task) task;
    _Atomic(const void *) args;
    _Atomic int helpers; /* that may take part */
    _Alignas(LINE) _Atomic int64_t unfinished;
    _Alignas(LINE) _Atomic int sleepers;
    atomic_flag busy;
    int started;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} team = {.busy = ATOMIC_FLAG_INIT,
          .mutex = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

static void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

static int64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

/* Do pieces as long as there are some for thread `number` (the caller is 0). */
static void take_pieces(int number)
{
    uint64_t ticket = atomic_load(&team.ticket);
    while (ticket & LEFT) {
        Task task = atomic_load_explicit(&team.task, memory_order_relaxed);
        const void *args = atomic_load_explicit(&team.args, memory_order_relaxed);
        if (number > atomic_load_explicit(&team.helpers, memory_order_relaxed))
            return;
        if (atomic_compare_exchange_weak(&team.ticket, &ticket, ticket - 1)) {
            task(args, (int64_t)(ticket & LEFT) - 1);
            atomic_fetch_sub_explicit(&team.unfinished, 1, memory_order_release);
            ticket = atomic_load(&team.ticket);
        }
    }
}

/* Until there is a job after `seen`; returns its number. */
static uint64_t await_job(uint64_t seen)
{
    const int64_t end = now_ns() + AWAKE_NS;
    do {
        for (int i = 0; i < 32; i++) {
            uint64_t job = atomic_load(&team.ticket) >> 32;
            if (job != seen)
                return job;
            relax();
        }
        sched_yield(); /* the caller may be waiting for this very core */
    } while (now_ns() < end);
    pthread_mutex_lock(&team.mutex);
    atomic_fetch_add(&team.sleepers, 1);
    while (atomic_load(&team.ticket) >> 32 == seen)
        pthread_cond_wait(&team.wake, &team.mutex);
    atomic_fetch_sub(&team.sleepers, 1);
    pthread_mutex_unlock(&team.mutex);
    return atomic_load(&team.ticket) >> 32;
}

static void *help(void *number)
{
    uint64_t job = 0;
    for (;;) {
        job = await_job(job);
        take_pieces((int)(intptr_t)number);
    }
    return NULL;
}

/* A forked child has its caller's thread only. */
static void forget_helpers(void)
{
    team.started = 0;
    atomic_store(&team.ticket, 0);
    atomic_store(&team.sleepers, 0);
    pthread_mutex_init(&team.mutex, NULL);
    pthread_cond_init(&team.wake, NULL);
    atomic_flag_clear(&team.busy);
}

/* Have `helpers` threads; fewer where the system gives no more. Signals are left to others. */
static void start(int helpers)
{
    static int registered;
    if (team.started >= helpers)
        return;
    if (!registered)
        registered = pthread_atfork(NULL, NULL, forget_helpers) == 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    while (team.started < helpers) {
        void *number = (void *)(intptr_t)(team.started + 1);
        if (pthread_create(&thread, NULL, help, number))
            break;
        pthread_detach(thread);
        team.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* task(args, piece) for every piece in [0, pieces), pieces < 2^32, on up to `threads` threads, the
 * caller's among them. Pieces are done in any order. */
void squall_team_run(Task task, const void *args, int64_t pieces, int threads)
{
    if (threads < 2 || pieces < 2 || atomic_flag_test_and_set(&team.busy)) {
        for (int64_t piece = 0; piece < pieces; piece++)
            task(args, piece);
        return;
    }
    int helpers = (threads < pieces ? threads : (int)pieces) - 1;
    helpers = helpers < MOST_HELPERS ? helpers : MOST_HELPERS;
    start(helpers);
    /* No pieces are left of the last job, so that nobody acts on what is changed here. */
    atomic_store_explicit(&team.task, task, memory_order_relaxed);
    atomic_store_explicit(&team.args, args, memory_order_relaxed);
    atomic_store_explicit(&team.helpers, helpers, memory_order_relaxed);
    atomic_store_explicit(&team.unfinished, pieces, memory_order_relaxed);
    const uint64_t job = (atomic_load(&team.ticket) >> 32) + 1;
    atomic_store(&team.ticket, job << 32 | (uint64_t)pieces);
    if (atomic_load(&team.sleepers)) {
        pthread_mutex_lock(&team.mutex);
        pthread_cond_broadcast(&team.wake);
        pthread_mutex_unlock(&team.mutex);
    }
    take_pieces(0);
    for (int spins = 0; atomic_load_explicit(&team.unfinished, memory_order_acquire); spins++)
        if (spins < 1000)
            relax();
        else
            sched_yield(); /* whoever has begun the last piece may need this core */
    atomic_flag_clear(&team.busy);
}
