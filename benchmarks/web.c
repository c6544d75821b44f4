/* web: closed-loop HTTP/1.1 clients on loopback, one process and one epoll, that check every answer.
 *
 *   web close|keep PORT CLIENTS SECONDS BODY
 *
 * close: a connection per request, which must end after the answer.
 * keep: each client keeps its connection. A server may end it, with `Connection: close` in an answer or between two of
 * them. That is no fault: the client opens another, which shows in the number of those opened.
 * An answer is right if its status is 200, its length (Content-Length, or one chunk and the last one) is that of BODY,
 * and its body is BODY.
 * Prints one JSON object: right answers, those inside the time, faults, connections opened, and the median and the 99th
 * percentile of the time from connect (or the request) to the last byte, in milliseconds, of the first million answers.
 *
 * In C because a Python client costs more than the servers that it would measure.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { ROOM = 8192, PATIENCE_SECONDS = 5, TIMES = 1000000 };

struct client {
    int fd, answered;
    size_t received;
    double started;
    char reply[ROOM + 1];
};

static struct sockaddr_in server = {.sin_family = AF_INET};
static const char *body;
static char request[256];
static size_t request_size, body_size;
static int keep, events;
static long good, good_in_time, bad, opened, waiting;
static double end;
static float times[TIMES]; /* milliseconds, of the first right answers */

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void drop(struct client *c)
{
    close(c->fd);
    c->fd = -1;
}

static int open_socket(struct client *c)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    int one = 1;

    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    opened++;
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&server, sizeof server))
        return -1;
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return epoll_ctl(events, EPOLL_CTL_ADD, c->fd, &event);
}

static int ask(struct client *c)
{
    return send(c->fd, request, request_size, MSG_NOSIGNAL) == (ssize_t)request_size;
}

static void begin(struct client *c)
{
    c->received = 0;
    c->answered = 0;
    c->started = now();
    if (c->fd >= 0 && !ask(c))
        drop(c); /* the server has closed it since its last answer */
    if (c->fd < 0 && (open_socket(c) || !ask(c))) {
        fprintf(stderr, "web: %s\n", strerror(errno));
        exit(1);
    }
    waiting++;
}

/* 1: a whole, right answer; 0: not whole yet; -1: wrong. */
static int judge(struct client *c)
{
    char *head_end, *length, chunk[32];
    size_t size;

    c->reply[c->received] = 0;
    if (!(head_end = strstr(c->reply, "\r\n\r\n")))
        return 0;
    if (strncmp(c->reply, "HTTP/1.1 200 ", 13))
        return -1;
    size = c->received - (head_end + 4 - c->reply);
    length = strcasestr(c->reply, "\r\ncontent-length:");
    if (length && length < head_end) {
        if ((size_t)atol(length + 17) != body_size || size > body_size)
            return -1;
        return size < body_size ? 0 : memcmp(head_end + 4, body, body_size) ? -1 : 1;
    }
    length = strcasestr(c->reply, "\r\ntransfer-encoding: chunked");
    if (!length || length > head_end)
        return -1;
    snprintf(chunk, sizeof chunk, "%zx\r\n", body_size);
    if (size < strlen(chunk) + body_size + 7)
        return 0;
    head_end += 4;
    if (strncasecmp(head_end, chunk, strlen(chunk)) || memcmp(head_end += strlen(chunk), body, body_size))
        return -1;
    return strcmp(head_end + body_size, "\r\n0\r\n\r\n") ? -1 : 1;
}

static void finish(struct client *c, int right)
{
    double at = now();

    waiting--;
    if (right) {
        if (good < TIMES)
            times[good] = (at - c->started) * 1e3;
        good++;
        good_in_time += at < end;
    } else {
        if (!bad++)
            fprintf(stderr, "web: wrong: %.300s\n", c->reply);
        if (c->fd >= 0)
            drop(c);
    }
    if (at < end)
        begin(c);
}

static void hear(struct client *c)
{
    ssize_t n = recv(c->fd, c->reply + c->received, ROOM - c->received, MSG_DONTWAIT);
    int verdict;

    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        int whole = n == 0 && c->answered;
        drop(c);
        if (keep && !c->answered && !c->received && c->started + 0.5 > now()) {
            waiting--; /* the server closed it just before the request came */
            begin(c);
        } else
            finish(c, whole);
        return;
    }
    c->received += n;
    verdict = judge(c);
    if (verdict < 0 || c->received == ROOM)
        finish(c, 0);
    else if (verdict && keep && !strcasestr(c->reply, "\r\nconnection: close"))
        finish(c, 1);
    else
        c->answered = verdict;
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    struct epoll_event ready[256];
    double started = now(), looked;
    int count;

    if (argc != 6)
        return fprintf(stderr, "usage: web close|keep PORT CLIENTS SECONDS BODY\n"), 2;
    keep = !strcmp(argv[1], "keep");
    server.sin_port = htons(atoi(argv[2]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    count = atoi(argv[3]);
    end = looked = started + atof(argv[4]);
    body = argv[5];
    body_size = strlen(body);
    request_size = snprintf(request, sizeof request,
                            "GET / HTTP/1.1\r\nHost: 127.0.0.1:%s\r\nUser-Agent: web\r\n%s\r\n", argv[2],
                            keep ? "" : "Connection: close\r\n");
    events = epoll_create1(EPOLL_CLOEXEC);
    struct client *clients = calloc(count, sizeof *clients);
    for (int i = 0; i < count; i++) {
        clients[i].fd = -1;
        begin(&clients[i]);
    }
    while (waiting) {
        int n = epoll_wait(events, ready, 256, 100);
        for (int i = 0; i < n; i++)
            hear(ready[i].data.ptr);
        if (now() > end + PATIENCE_SECONDS) {
            fprintf(stderr, "web: %ld of %d clients wait for an answer\n", waiting, count);
            bad += waiting;
            break;
        }
    }
    long kept = good < TIMES ? good : TIMES;
    qsort(times, kept, sizeof *times, by_size);
    printf("{\"good\": %ld, \"good_in_time\": %ld, \"bad\": %ld, \"opened\": %ld, \"seconds\": %f, ", good,
           good_in_time, bad, opened, end - started);
    printf("\"p50\": %g, \"p99\": %g, \"pids\": {}}\n", kept ? times[kept / 2] : 0, kept ? times[kept * 99 / 100] : 0);
    return 0;
}
