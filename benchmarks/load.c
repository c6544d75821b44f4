/* load: closed-loop clients on loopback, one process and one epoll, that check every byte of every reply.
 *
 *   load tcp|udp PORT CLIENTS SECONDS echo|tag
 *   load tcp     PORT CLIENTS SECONDS fixed REQUEST REPLY
 *
 * echo: 64 fresh bytes must come back as they were, followed (TCP) by the end of the connection.  tag: the same, then 8
 * bytes with the pid that served, which are counted.  fixed: a line is sent and the reply given must come back.
 * Prints one JSON object: checked replies, replies inside the time, faults, the replies of each pid, and the median and
 * the 99th percentile of the time from connect to the last byte, in milliseconds, of the first million replies.
 *
 * In C because a Python client costs more than the servers that it would measure.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PAYLOAD = 64, ROOM = 256, PIDS = 4096, PATIENCE_SECONDS = 5, TIMES = 1000000 };

struct client {
    int fd;
    size_t sent, received;
    double started;
    char request[ROOM], reply[ROOM];
};

static struct sockaddr_in server = {.sin_family = AF_INET};
static int datagrams, events;
static const char *mode, *fixed_request, *fixed_reply;
static struct { int64_t pid; long count; } served[PIDS];
static long good, good_in_time, bad, waiting;
static double end;
static float times[TIMES]; /* milliseconds, of the first good replies */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void count_pid(int64_t pid)
{
    uint64_t i = (uint64_t)pid % PIDS;
    while (served[i].count && served[i].pid != pid)
        i = (i + 1) % PIDS;
    served[i].pid = pid;
    served[i].count++;
}

static void make_request(struct client *c)
{
    static uint64_t x = 88172645463325252u;

    c->received = 0;
    if (fixed_request) {
        c->sent = strlen(fixed_request);
        memcpy(c->request, fixed_request, c->sent);
        return;
    }
    c->sent = PAYLOAD;
    for (size_t i = 0; i < PAYLOAD; i += sizeof x) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        memcpy(c->request + i, &x, sizeof x);
    }
}

static int open_socket(struct client *c)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};

    c->fd = socket(AF_INET, (datagrams ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
    return c->fd < 0 || connect(c->fd, (struct sockaddr *)&server, sizeof server)
        || epoll_ctl(events, EPOLL_CTL_ADD, c->fd, &event);
}

/* Sends the client's next request, unless the time is over; a client that cannot even start is not asked again. */
static void begin(struct client *c)
{
    c->started = now();
    if (c->started >= end)
        return;
    make_request(c);
    if ((c->fd < 0 && open_socket(c)) || send(c->fd, c->request, c->sent, MSG_NOSIGNAL) != (ssize_t)c->sent) {
        perror("load");
        bad++;
        return;
    }
    waiting++;
}

static int reply_is_right(struct client *c)
{
    int64_t pid;

    if (fixed_reply)
        return c->received == strlen(fixed_reply) && !memcmp(c->reply, fixed_reply, c->received);
    if (c->received < PAYLOAD || memcmp(c->reply, c->request, PAYLOAD))
        return 0;
    if (strcmp(mode, "tag"))
        return c->received == PAYLOAD;
    memcpy(&pid, c->reply + PAYLOAD, sizeof pid);
    if (c->received != PAYLOAD + sizeof pid)
        return 0;
    count_pid(pid);
    return 1;
}

static void finish(struct client *c, int failed)
{
    waiting--;
    if (!datagrams || failed) {
        close(c->fd);
        c->fd = -1;
    }
    if (failed || !reply_is_right(c))
        bad++;
    else {
        if (good < TIMES)
            times[good] = (now() - c->started) * 1e3;
        good++;
        good_in_time += now() < end;
    }
    begin(c);
}

/* Reads what is there; a stream's reply is whole at its end of file, a datagram's at once. */
static void receive(struct client *c)
{
    while (c->received < ROOM) {
        ssize_t n = recv(c->fd, c->reply + c->received, ROOM - c->received, MSG_DONTWAIT);
        if (n < 0) {
            if (errno != EAGAIN)
                finish(c, 1);
            return;
        }
        c->received += n;
        if (n == 0 || datagrams) {
            finish(c, 0);
            return;
        }
    }
    finish(c, 1);
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void print_result(double seconds)
{
    const char *comma = "";
    long kept = good < TIMES ? good : TIMES;

    qsort(times, kept, sizeof *times, by_size);
    printf("{\"good\": %ld, \"good_in_time\": %ld, \"bad\": %ld, "
           "\"seconds\": %g, \"p50\": %g, \"p99\": %g, \"pids\": {",
           good, good_in_time, bad, seconds, kept ? times[kept / 2] : 0, kept ? times[kept * 99 / 100] : 0);
    for (int i = 0; i < PIDS; i++)
        if (served[i].count) {
            printf("%s\"%lld\": %ld", comma, (long long)served[i].pid, served[i].count);
            comma = ", ";
        }
    puts("}}");
}

int main(int argc, char **argv)
{
    struct epoll_event ready[64];

    if (argc < 6 || (!strcmp(argv[5], "fixed") && argc < 8))
        return 2;
    datagrams = !strcmp(argv[1], "udp");
    server.sin_port = htons(atoi(argv[2]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int clients = atoi(argv[3]);
    double seconds = atof(argv[4]);
    mode = argv[5];
    if (!strcmp(mode, "fixed")) {
        fixed_request = argv[6], fixed_reply = argv[7];
        if (strlen(fixed_request) > ROOM)
            return 2;
    }
    struct client *all = calloc(clients, sizeof *all);
    if (!all)
        return 1;
    events = epoll_create1(EPOLL_CLOEXEC);
    end = now() + seconds;
    for (int i = 0; i < clients; i++) {
        all[i].fd = -1;
        begin(&all[i]);
    }
    while (waiting && now() < end + PATIENCE_SECONDS) {
        int n = epoll_wait(events, ready, 64, 100);
        for (int i = 0; i < n; i++)
            receive(ready[i].data.ptr);
    }
    bad += waiting; /* unanswered */
    print_result(seconds);
    return 0;
}
