/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * read FILE THREADS: how many seconds it takes to map FILE and to read all of it, each thread a part. The least that any
 * program that looks at each byte of a guest's RAM must do.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

struct part {
    const uint64_t *words;
    size_t count;
    uint64_t sum;
    pthread_t thread;
};

static void *sum(void *argument)
{
    struct part *part = argument;
    uint64_t sum = 0;
    for (size_t at = 0; at < part->count; at++)
        sum += part->words[at];
    part->sum = sum;
    return NULL;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

int main(int count, char **arguments)
{
    int file = count == 3 ? open(arguments[1], O_RDONLY) : -1;
    int threads = count == 3 ? atoi(arguments[2]) : 0;
    struct stat info;
    if (file < 0 || fstat(file, &info) || threads < 1)
        return 2;
    double begun = now();
    const char *bytes = mmap(NULL, info.st_size, PROT_READ, MAP_SHARED, file, 0);
    if (bytes == MAP_FAILED)
        return 1;
    struct part parts[threads];
    size_t words = info.st_size / 8 / threads;
    for (int n = 0; n < threads; n++) {
        parts[n] = (struct part){.words = (const uint64_t *)bytes + n * words, .count = words};
        if (pthread_create(&parts[n].thread, NULL, sum, &parts[n]))
            return 1;
    }
    uint64_t whole = 0;
    for (int n = 0; n < threads; n++) {
        pthread_join(parts[n].thread, NULL);
        whole += parts[n].sum;
    }
    printf("%.9f %llu\n", now() - begun, (unsigned long long)whole);
    return 0;
}
