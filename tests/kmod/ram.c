// SPDX-FileCopyrightText: The hecaton.fleet authors
// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A process that uses a RAM file as a VM does, and knows what each page has to
 * hold. What a page holds follows from its number and from how often it was
 * written, which is counted in a second file, the shadow: 32 bits for each
 * page, 0 for a page of zeroes. The shadow goes with the VM by other means.
 *
 *   ram fill FILE SHADOW             write all pages but some
 *   ram run FILE SHADOW THREADS OPS  check and write pages at random
 *   ram check FILE SHADOW THREADS HOW  compare all pages
 *   ram hold FILE                    keep it mapped and do as told
 *
 * Each prints JSON, one object a line. "run" and "hold" take commands, one a
 * line. OPS are letters, see step(); HOW is map, read, mem, vm, write, or left
 * (by read(2), of a file that has lost pages: those are counted).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define PAGE 4096UL
#define MARKS 8
#define STRIDE (PAGE / MARKS)

static const char *path;
static int fd;
static char *ram;
static unsigned long pages;
static _Atomic uint32_t *shadow;
static unsigned int threads;
static const char *how;

static atomic_bool running, ending;
static atomic_uint resting;
static atomic_ulong steps, bad, lost;
static atomic_bool told;

static void die(const char *what)
{
	printf("{\"error\": \"%s: %s\"}\n", what, strerror(errno));
	fflush(stdout);
	/* Not exit(): it waits for stdin, which another thread reads. */
	_exit(1);
}

static uint64_t mark(unsigned long page, uint32_t count, unsigned int at)
{
	uint64_t x = page * 0x9e3779b97f4a7c15ULL ^ count * 0xbf58476d1ce4e5b9ULL ^ at;

	x ^= x >> 31;
	x *= 0x94d049bb133111ebULL;
	return (x ^ x >> 29) | 1;	/* never zero */
}

static void compose(char *to, unsigned long page, uint32_t count)
{
	unsigned int i;

	memset(to, 0, PAGE);
	for (i = 0; count && i < MARKS; i++)
		*(uint64_t *)(to + i * STRIDE) = mark(page, count, i);
}

/* The first eight bytes that are not as they have to be, or -1. */
static long differs(const char *is, unsigned long page, uint32_t count,
		    unsigned int marks)
{
	char should[PAGE];
	unsigned long i;

	compose(should, page, count);
	for (i = 0; i < marks * STRIDE; i += 8)
		if (*(uint64_t *)(is + i) != *(uint64_t *)(should + i))
			return i;
	return -1;
}

static bool verify(const char *is, unsigned long page, unsigned int marks,
		   const char *by)
{
	uint32_t count = shadow[page], older;
	long at = differs(is, page, count, marks);
	const char *kind = "garbled";

	if (at < 0)
		return true;
	bad++;
	if (atomic_exchange(&told, true))
		return false;
	if (differs(is, page, 0, marks) < 0)
		kind = "zero";
	else
		for (older = count; older && older + 1000 > count; older--)
			if (differs(is, page, older - 1, marks) < 0) {
				kind = "stale";
				break;
			}
	printf("{\"bad\": \"%s\", \"page\": %lu, \"count\": %u, \"at\": %ld, \"by\": \"%s\", \"found\": \"%#lx\"}\n",
	       kind, page, count, at, by, *(uint64_t *)(is + at));
	fflush(stdout);
	return false;
}

static uint64_t draw(uint64_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state;
}

static void write_marks(unsigned long page, uint32_t count)
{
	unsigned int i;

	for (i = 0; i < MARKS; i++)
		*(volatile uint64_t *)(ram + page * PAGE + i * STRIDE) =
			mark(page, count, i);
}

/*
 * Whether a page is wrong, as a child sees it: where it has it mapped itself,
 * or as a debugger of a thread of its parent, which it stops. 2: can't say.
 */
static int look(unsigned long page, uint32_t count, pid_t thread)
{
	char *at = ram + page * PAGE;
	long copy[PAGE / sizeof(long)];
	unsigned long i;
	bool failed;
	int status;

	if (!thread)
		return differs(at, page, count, MARKS) >= 0;
	if (ptrace(PTRACE_ATTACH, thread, NULL, NULL) ||
	    waitpid(thread, &status, __WALL) != thread)
		return 2;
	errno = 0;
	for (i = 0; !errno && i < PAGE / sizeof(long); i++)
		copy[i] = ptrace(PTRACE_PEEKDATA, thread, at + i * sizeof(long), NULL);
	failed = errno != 0;
	/* Also then: without it, what stopped the thread would stop its process. */
	if (ptrace(PTRACE_DETACH, thread, NULL, NULL) || failed)
		return 2;
	return differs((char *)copy, page, count, MARKS) >= 0;
}

static void let_look(unsigned long page, uint32_t count, bool debugger)
{
	pid_t thread = debugger ? gettid() : 0;
	pid_t child = fork();
	int status;

	if (!child)
		_exit(look(page, count, thread));
	while (child < 0 || waitpid(child, &status, 0) < 0)
		if (child < 0 || errno != EINTR)
			die("child");
	if (!WIFEXITED(status) || WEXITSTATUS(status) > 1) {
		errno = EIO;
		die("what a child sees");
	}
	bad += WEXITSTATUS(status);
}

/* One access to a page that is this thread's alone. */
static void step(unsigned long page, char op, char *buf, int disk, int mem,
		 unsigned int t)
{
	uint32_t count = shadow[page];
	char *at = ram + page * PAGE;
	struct iovec here = { buf, PAGE }, there = { at, PAGE };

	switch (op) {
	case 'c':	/* check */
		verify(at, page, MARKS, "run");
		break;
	case 'r':	/* check by read(2) */
		if (pread(fd, buf, PAGE, page * PAGE) != PAGE)
			die("pread");
		verify(buf, page, MARKS, "pread");
		break;
	case 'g':	/* check as a debugger reads, with the lock held */
		if (pread(mem, buf, PAGE, (off_t)(uintptr_t)at) != PAGE)
			die("read of /proc/self/mem");
		verify(buf, page, MARKS, "mem");
		break;
	case 'f':	/* let a child check */
	case 't':	/* let one check that stops this thread */
		let_look(page, count, op == 't');
		break;
	case 'w':	/* write */
		verify(at, page, MARKS, "run");
		write_marks(page, count + 1);
		shadow[page] = count + 1;
		break;
	case 'z':	/* write zeroes */
		memset(at, 0, PAGE);
		shadow[page] = 0;
		break;
	case 'h':	/* punch a hole */
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			      page * PAGE, PAGE))
			die("punch");
		shadow[page] = 0;
		break;
	case 'm':	/* the same by the mapping */
		if (madvise(at, PAGE, MADV_REMOVE))
			die("MADV_REMOVE");
		shadow[page] = 0;
		break;
	case 'p':	/* write(2) */
		compose(buf, page, count + 1);
		if (pwrite(fd, buf, PAGE, page * PAGE) != PAGE)
			die("pwrite");
		shadow[page] = count + 1;
		break;
	case 'v':	/* by another's hand, as a debugger does */
		compose(buf, page, count + 1);
		if (process_vm_writev(getpid(), &here, 1, &there, 1, 0) != PAGE)
			die("process_vm_writev");
		shadow[page] = count + 1;
		break;
	case 'd':	/* a disk writes into it */
		compose(buf, page, count + 1);
		if (pwrite(disk, buf, PAGE, t * PAGE) != PAGE)
			die("write to disk");
		if (pread(disk, at, PAGE, t * PAGE) != PAGE)
			die("direct read");
		shadow[page] = count + 1;
		break;
	case 'k':	/* write access goes and comes back */
		if (mprotect(at, PAGE, PROT_READ) ||
		    mprotect(at, PAGE, PROT_READ | PROT_WRITE))
			die("mprotect");
		write_marks(page, count + 1);
		shadow[page] = count + 1;
		break;
	}
	steps++;
}

static void *run_thread(void *arg)
{
	unsigned int t = (uintptr_t)arg, n = 0;
	uint64_t random = 0x1234567 + t * 7919 + getpid();
	char *buf = aligned_alloc(PAGE, PAGE);
	size_t ops = strlen(how);
	int disk = -1, mem = -1;

	if (strchr(how, 'g')) {
		mem = open("/proc/self/mem", O_RDONLY);
		if (mem < 0)
			die("/proc/self/mem");
	}
	if (strchr(how, 'd')) {
		disk = open("/var/tmp/ram.disk", O_RDWR | O_CREAT | O_DIRECT, 0600);
		if (disk < 0)
			die("/var/tmp/ram.disk");
	}
	while (!ending) {
		if (!running) {
			resting++;
			while (!running && !ending)
				usleep(1000);
			resting--;
			continue;
		}
		step(draw(&random) % (pages / threads) * threads + t,
		     how[draw(&random) % ops], buf, disk, mem, t);
		/* One CPU is shared with all that is to be tested. */
		if (++n % 16 == 0)
			usleep(500);
	}
	return NULL;
}

static void run(void)
{
	pthread_t thread[64];
	char line[64];
	unsigned int t;

	running = true;
	for (t = 0; t < threads; t++)
		pthread_create(&thread[t], NULL, run_thread, (void *)(uintptr_t)t);
	printf("{\"started\": true}\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "stop\n")) {
			running = false;
			while (resting < threads)
				usleep(500);
		} else if (!strcmp(line, "go\n")) {
			running = true;
		} else {
			break;
		}
		printf("{\"steps\": %lu, \"bad\": %lu}\n", steps, bad);
		fflush(stdout);
	}
	ending = true;
	for (t = 0; t < threads; t++)
		pthread_join(thread[t], NULL);
	printf("{\"steps\": %lu, \"bad\": %lu}\n", steps, bad);
}

static void *check_thread(void *arg)
{
	unsigned int t = (uintptr_t)arg;
	unsigned long i, page = pages * t / threads;
	char *buf = aligned_alloc(PAGE, PAGE);
	int mem = -1;

	if (!strcmp(how, "mem")) {
		mem = open("/proc/self/mem", O_RDONLY);
		if (mem < 0)
			die("/proc/self/mem");
	}
	/* Each thread looks at every page, each in an order of its own. */
	for (i = 0; i < pages; i++) {
		char *at = ram + page * PAGE;
		struct iovec here = { buf, PAGE }, there = { at, PAGE };

		if (!strcmp(how, "map")) {
			verify(at, page, MARKS, how);
		} else if (!strcmp(how, "read")) {
			if (pread(fd, buf, PAGE, page * PAGE) != PAGE)
				die("pread");
			verify(buf, page, MARKS, how);
		} else if (!strcmp(how, "left")) {
			if (pread(fd, buf, PAGE, page * PAGE) == PAGE)
				verify(buf, page, MARKS, how);
			else if (errno == EIO)
				lost++;
			else
				die("pread");
		} else if (!strcmp(how, "mem")) {
			if (pread(mem, buf, PAGE, (off_t)(uintptr_t)at) != PAGE)
				die("read of /proc/self/mem");
			verify(buf, page, MARKS, how);
		} else if (!strcmp(how, "vm")) {
			if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != PAGE)
				die("process_vm_readv");
			verify(buf, page, MARKS, how);
		} else if (page % threads == t) {
			/* The first access is a write; the rest has to be there. */
			*(volatile uint64_t *)(at + (MARKS - 1) * STRIDE) = 1;
			verify(at, page, MARKS - 1, how);
			write_marks(page, shadow[page] + 1);
			shadow[page]++;
		}
		steps++;
		page = (page + 7919 + 2 * t) % pages;
	}
	return NULL;
}

static void check(void)
{
	pthread_t thread[64];
	unsigned int t;

	for (t = 0; t < threads; t++)
		pthread_create(&thread[t], NULL, check_thread, (void *)(uintptr_t)t);
	for (t = 0; t < threads; t++)
		pthread_join(thread[t], NULL);
	printf("{\"pages\": %lu, \"looked\": %lu, \"bad\": %lu, \"lost\": %lu}\n",
	       pages, steps, bad, lost);
}

static void fill(void)
{
	unsigned long page;

	for (page = 0; page < pages; page++) {
		/* Some stay holes, some are zeroes that were written. */
		uint32_t count = page % 16 == 5 || page % 16 == 6 ? 0 : 1;

		if (count)
			write_marks(page, count);
		else if (page % 16 == 6)
			memset(ram + page * PAGE, 0, PAGE);
		shadow[page] = count;
	}
	printf("{\"pages\": %lu}\n", pages);
}

/* -- hold ----------------------------------------------------------------- */

static sigjmp_buf back;
static volatile int bus_code;

static void on_bus(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	bus_code = info->si_code;
	siglongjmp(back, 1);
}

/* Pins a page for long, as VFIO or a registered buffer does. */
static long pin_long(void *at)
{
	char params[256] = { 0 };
	struct iovec iov = { at, PAGE };
	int ring = syscall(SYS_io_uring_setup, 1, params);
	long ret;

	if (ring < 0)
		return -errno;
	ret = syscall(SYS_io_uring_register, ring, 0, &iov, 1);
	/* The ring stays open, and with it the pin. */
	return ret ? -errno : 0;
}

static void obey(char *line)
{
	unsigned long page = 0, value = 0;
	char what[16] = "";
	volatile long ret = 0;

	sscanf(line, "%15s %lu %lu", what, &page, &value);
	if (sigsetjmp(back, 1)) {
		printf("{\"sigbus\": %d}\n", bus_code);
		return;
	}
	if (!strcmp(what, "peek")) {
		printf("{\"value\": %lu}\n", *(volatile uint64_t *)(ram + page * PAGE));
		return;
	}
	if (!strcmp(what, "poke"))
		*(volatile uint64_t *)(ram + page * PAGE) = value;
	else if (!strcmp(what, "sweep"))
		for (; page < pages; page++)
			*(volatile uint64_t *)(ram + page * PAGE) = page + value;
	else if (!strcmp(what, "protect"))
		ret = mprotect(ram, pages * PAGE, page ? PROT_READ | PROT_WRITE : PROT_READ);
	else if (!strcmp(what, "remove"))
		ret = madvise(ram + page * PAGE, value * PAGE, MADV_REMOVE);
	else if (!strcmp(what, "collapse"))
		ret = madvise(ram, pages * PAGE, MADV_COLLAPSE);
	else if (!strcmp(what, "pageout"))
		ret = madvise(ram, pages * PAGE, MADV_PAGEOUT);
	else if (!strcmp(what, "poison"))
		ret = madvise(ram + page * PAGE, PAGE, MADV_HWPOISON);
	else if (!strcmp(what, "pin"))
		ret = (errno = -pin_long(ram + page * PAGE)) ? -1 : 0;
	else if (!strcmp(what, "fork"))
		ret = fork();
	else {
		errno = ENOSYS;
		ret = -1;
	}
	if (!strcmp(what, "fork") && !ret) {
		/* The child looks at what the parent has mapped, and ends. */
		printf("{\"value\": %lu}\n", *(volatile uint64_t *)(ram + page * PAGE));
		fflush(stdout);
		_exit(0);
	}
	if (strcmp(what, "fork"))
		printf("{\"ret\": %ld, \"errno\": %d}\n", ret, ret ? errno : 0);
}

static void hold(void)
{
	struct sigaction action = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO };
	char line[64];

	sigaction(SIGBUS, &action, NULL);
	printf("{\"started\": true}\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		obey(line);
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	struct stat st;
	int sh;

	if (argc < 3)
		return 2;
	path = argv[2];
	fd = open(path, O_RDWR);
	if (fd < 0 || fstat(fd, &st))
		die(path);
	pages = st.st_size / PAGE;
	ram = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ram == MAP_FAILED)
		die("mmap");
	if (!strcmp(argv[1], "hold")) {
		hold();
		return 0;
	}
	sh = open(argv[3], O_RDWR | O_CREAT, 0600);
	if (sh < 0 || ftruncate(sh, pages * sizeof(*shadow)))
		die(argv[3]);
	shadow = mmap(NULL, pages * sizeof(*shadow), PROT_READ | PROT_WRITE, MAP_SHARED, sh, 0);
	if (shadow == MAP_FAILED)
		die("mmap of the shadow");
	if (argc > 5) {
		threads = atoi(argv[4]);
		how = argv[5];
		if (threads < 1 || threads > 64 || pages < threads)
			return 2;
	}
	if (!strcmp(argv[1], "fill"))
		fill();
	else if (!strcmp(argv[1], "run"))
		run();
	else if (!strcmp(argv[1], "check"))
		check();
	return 0;
}
