/* yard: the yardstick, a prefork server in C that does what socketserver's chain does and nothing more.
 *
 *   yard tcp|udp WORKERS [tag]
 *
 * It binds a free port of 127.0.0.1, prints it on a line, and forks the workers, each of which blocks in accept() or
 * recvfrom() on the one shared socket.  A TCP request is one recv(), one send(), shutdown() and close(), the same four
 * system calls as a BaseRequestHandler's; with "tag" the reply carries the worker's pid (8 bytes, this machine's order)
 * after the echo.  TERM ends the workers by their pids, then the parent.  An alarm ends them all if nobody does.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BACKLOG = 1024, RECEIVE_BUFFER = 1 << 20, LIFE_SECONDS = 900 };

static int64_t tag;
static size_t tag_size;

static void serve_stream(int listener)
{
    char data[4096 + sizeof tag];

    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        ssize_t size = recv(fd, data, 4096, 0);
        if (size > 0) {
            memcpy(data + size, &tag, tag_size);
            if (send(fd, data, size + tag_size, MSG_NOSIGNAL) < 0)
                perror("yard: send");
        }
        shutdown(fd, SHUT_WR);
        close(fd);
    }
}

static void serve_datagrams(int server)
{
    char data[8192 + sizeof tag];
    struct sockaddr_in peer;

    for (;;) {
        socklen_t length = sizeof peer;
        ssize_t size = recvfrom(server, data, 8192, 0, (struct sockaddr *)&peer, &length);
        if (size < 0)
            continue;
        memcpy(data + size, &tag, tag_size);
        if (sendto(server, data, size + tag_size, 0, (struct sockaddr *)&peer, length) < 0)
            perror("yard: sendto");
    }
}

static int bound_socket(int type)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int size = RECEIVE_BUFFER, fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);

    if (type == SOCK_DGRAM)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (bind(fd, (struct sockaddr *)&address, length) || (type == SOCK_STREAM && listen(fd, BACKLOG))
        || getsockname(fd, (struct sockaddr *)&address, &length)) {
        perror("yard");
        exit(1);
    }
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    int datagrams = !strcmp(argv[1], "udp"), workers = atoi(argv[2]), signal_number;
    pid_t pids[workers];
    sigset_t term;

    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigaddset(&term, SIGINT);
    sigprocmask(SIG_BLOCK, &term, NULL);
    int fd = bound_socket(datagrams ? SOCK_DGRAM : SOCK_STREAM);
    tag_size = argc > 3 ? sizeof tag : 0;
    for (int i = 0; i < workers; i++) {
        pids[i] = fork();
        if (pids[i])
            continue;
        alarm(LIFE_SECONDS);
        tag = getpid();
        (datagrams ? serve_datagrams : serve_stream)(fd);
    }
    alarm(LIFE_SECONDS);
    sigwait(&term, &signal_number);
    for (int i = 0; i < workers; i++)
        if (pids[i] > 0)
            kill(pids[i], SIGKILL);
    for (int i = 0; i < workers; i++)
        if (pids[i] > 0)
            waitpid(pids[i], NULL, 0);
    return 0;
}
