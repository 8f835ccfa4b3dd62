// SPDX-FileCopyrightText: The hecaton.fleet authors
// SPDX-License-Identifier: GPL-3.0-or-later
/*
 * The only program of the lab's smallest guest: it dirties memory, knows at any time what every page has to hold,
 * and tells on the serial port how long each access took. See README.md for its words and lines.
 *
 * Built with -DSELFTEST it is an ordinary process that takes its words as arguments and talks on stdin and stdout.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define PAGE_BYTES 4096
#define WORDS (PAGE_BYTES / sizeof(uint64_t))
#define PAGES_PER_MIB (1024 * 1024 / PAGE_BYTES)
#define MARKS 8
#define MARK(k) ((k) * 73) /* the first word, the last (7 * 73 == 511), and six between them */
#define MS 1000000ULL
#define SECOND 1000000000ULL
#define BUCKETS 27
#define LINE_BYTES 400
#define SERIAL_QUEUE 4000 /* the kernel queues one page for a serial port */
#define RESERVE_MIB 4	  /* left to the guest's kernel */

enum pattern { SEQ, RANDOM, HOT };

static struct {
	uint64_t mib, bloat_mib, zero_mib, hot_mib, seed, report_s, sweep_s, tick_ms, zero_every, available_mib;
	uint64_t churn_mib;
	int64_t rate; /* MiB/s; 0: as fast as it goes; below 0: not at all */
	enum pattern pattern;
} config = { .mib = 48, .hot_mib = 8, .seed = 1, .report_s = 1, .sweep_s = 10, .tick_ms = 5, .zero_every = 64 };

static const char *const pattern_names[] = { "seq", "random", "hot" };

/* [0, dirty_pages) are written again and again, [dirty_pages, zero_from) once, [zero_from, pages) hold zeroes. */
static uint32_t pages, dirty_pages, hot_pages, zero_from;
static uint64_t (*ram)[WORDS];
/* How often each page was written; the mirror holds the complement, so that a stale copy of either is noticed. */
static uint32_t *shadow, *mirror;
static uint64_t keys[MARKS];

static struct {
	uint64_t touched, checked, sweeps, corrupt, dropped, seq;
	uint64_t stall_max, stall_worst, gap_max;
	uint64_t hist[BUCKETS];
} stats;

/* ---------------------------------------------------------------------------------------------------- clock */

static struct {
	bool use;
	uint64_t at, ns;
	double ns_per_tick;
} tsc;
static uint64_t last_ns;

static uint64_t monotonic(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static void anchor(void)
{
	uint64_t ns = monotonic(), at = __rdtsc();
	double rate = at > tsc.at ? (double)(ns - tsc.ns) / (double)(at - tsc.at) : 0;

	/* A guest that changed hosts may count at another rate, or from another offset: take only what is plausible. */
	if (rate > tsc.ns_per_tick / 2 && rate < tsc.ns_per_tick * 2 && ns - tsc.ns > 10 * MS)
		tsc.ns_per_tick = rate;
	tsc.at = at;
	tsc.ns = ns;
}

/* CLOCK_MONOTONIC. Where that is a slow system call, the TSC fills in, but only over short and ordinary spans. */
static uint64_t now(void)
{
	uint64_t ns;

	if (tsc.use) {
		uint64_t ticks = __rdtsc();

		ns = tsc.ns + (uint64_t)((double)(ticks - tsc.at) * tsc.ns_per_tick);
		if (ticks < tsc.at || ns > tsc.ns + 20 * MS || ns > last_ns + MS) {
			anchor();
			ns = tsc.ns;
		}
	} else {
		ns = monotonic();
	}
	return ns > last_ns ? ns : last_ns;
}

/* Reads the clock; a time since the last reading that is longer than planned is a gap in which nothing ran here. */
static uint64_t lap(uint64_t planned)
{
	uint64_t ns = now(), passed = ns - last_ns;

	last_ns = ns;
	if (passed > planned && passed - planned > stats.gap_max)
		stats.gap_max = passed - planned;
	return ns;
}

static void start_clock(void)
{
	uint64_t begin = monotonic(), ns = begin, at = __rdtsc();
	int calls = 0;

	while (ns - begin < 20 * MS) {
		ns = monotonic();
		calls++;
	}
	tsc.ns_per_tick = (double)(ns - begin) / (double)(__rdtsc() - at);
	tsc.use = (ns - begin) / calls > 1000;
	anchor();
	last_ns = tsc.ns;
}

static void stall(uint64_t ns)
{
	uint64_t us = ns / 1000;
	int bucket = us ? 64 - __builtin_clzll(us) : 0;

	stats.hist[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
	if (us > stats.stall_max)
		stats.stall_max = us;
	if (us > stats.stall_worst)
		stats.stall_worst = us;
}

/* --------------------------------------------------------------------------------------------------- serial */

static int serial_in, serial_out;

/* Writes one line, or drops it when the port has no room: a port that nobody reads must not stop the guest. */
static bool __attribute__((format(printf, 1, 2))) say(const char *format, ...)
{
	static bool cut;
	char line[LINE_BYTES];
	int queued, length;
	ssize_t written;
	va_list args;

	length = snprintf(line, sizeof(line), "%s@hecaton ", cut ? "\n" : "");
	va_start(args, format);
	length += vsnprintf(line + length, sizeof(line) - length, format, args);
	va_end(args);
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';

	if (ioctl(serial_out, TIOCOUTQ, &queued) == 0 && queued + length > SERIAL_QUEUE)
		written = -1;
	else
		written = write(serial_out, line, length);
	if (written == length) {
		cut = false;
		return true;
	}
	if (written > 0)
		cut = true;
	stats.dropped++;
	return false;
}

/* -------------------------------------------------------------------------------------------------- content */

static uint64_t mix(uint64_t x)
{
	x += 0x9E3779B97F4A7C15;
	x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
	x = (x ^ x >> 27) * 0x94D049BB133111EB;
	return x ^ x >> 31;
}

/* Pages become zeroes now and then, since migration treats those in its own way. */
static bool blank(uint32_t page, uint32_t count)
{
	return page >= zero_from || (config.zero_every && count % config.zero_every == config.zero_every - 1);
}

static uint64_t mark(uint32_t page, uint32_t count, int k)
{
	return ((uint64_t)page << 32 | count) ^ keys[k];
}

static void write_marks(uint64_t *words, uint32_t page, uint32_t count)
{
	for (int k = 0; k < MARKS; k++)
		words[MARK(k)] = mark(page, count, k);
}

/* The whole content of a page after it was written `count` times. */
static void fill(uint64_t *words, uint32_t page, uint32_t count)
{
	uint64_t word = mix(config.seed ^ (uint64_t)page << 20);

	if (blank(page, count)) {
		memset(words, 0, PAGE_BYTES);
		return;
	}
	for (size_t i = 0; i < WORDS; i++, word += 0xD1342543DE82EF95)
		words[i] = word;
	write_marks(words, page, count);
}

static bool marks_hold(uint32_t page, uint32_t count)
{
	const uint64_t *words = ram[page];
	uint64_t wrong = 0;

	if (blank(page, count))
		for (int k = 0; k < MARKS; k++)
			wrong |= words[MARK(k)];
	else
		for (int k = 0; k < MARKS; k++)
			wrong |= words[MARK(k)] ^ mark(page, count, k);
	return !wrong;
}

static void count_is(uint32_t page, uint32_t count)
{
	shadow[page] = count;
	mirror[page] = ~count;
}

/* ----------------------------------------------------------------------------------------------- corruption */

static const char *kind_of(uint32_t page, uint32_t count, uint32_t *found)
{
	const uint64_t *words = ram[page];
	int same_page = 0, same_count = 0, older = 0;
	bool zero = true;

	for (size_t i = 0; i < WORDS; i++)
		zero = zero && !words[i];
	*found = 0;
	if (zero)
		return "zero";
	for (int k = 0; k < MARKS; k++) {
		uint64_t plain = words[MARK(k)] ^ keys[k];

		if (plain >> 32 != page)
			continue;
		same_page++;
		same_count += (uint32_t)plain == count;
		if ((int32_t)((uint32_t)plain - count) < 0) {
			older++;
			*found = plain;
		}
	}
	if (older == MARKS)
		return "stale";
	if (older && older + same_count == MARKS)
		return "torn";
	if (same_count == MARKS) {
		*found = count;
		return "body";
	}
	return same_page ? "garbled" : "foreign";
}

static bool __attribute__((noinline)) corrupt(uint32_t page, const char *by)
{
	uint64_t expected[WORDS];
	uint32_t count = shadow[page], found;
	static uint64_t second, lines;
	const char *kind;
	size_t at = 0;

	if (count != ~mirror[page]) {
		found = ~mirror[page];
		kind = "shadow";
		if (marks_hold(page, found)) {
			uint32_t other = count;

			count = found;
			found = other;
		}
	} else {
		kind = kind_of(page, count, &found);
	}
	fill(expected, page, count);
	while (at < WORDS && ram[page][at] == expected[at])
		at++;
	stats.corrupt++;
	if (last_ns / SECOND != second) {
		second = last_ns / SECOND;
		lines = 0;
	}
	if (lines++ < 5)
		say("{\"error\":\"corrupt\",\"page\":%u,\"kind\":\"%s\",\"at\":%zu,\"expected\":%u,\"found\":%u,"
		    "\"word\":\"%016llx\",\"by\":\"%s\",\"uptime_ms\":%llu}",
		    page, kind, at < WORDS ? at * 8 : 0, count, found,
		    (unsigned long long)ram[page][at < WORDS ? at : 0], by, (unsigned long long)(last_ns / MS));
	/* Made good, so that each damage is counted once. */
	count_is(page, count);
	memcpy(ram[page], expected, PAGE_BYTES);
	return false;
}

static bool check_whole(uint32_t page, const char *by)
{
	uint64_t expected[WORDS];

	fill(expected, page, shadow[page]);
	stats.checked++;
	if (shadow[page] != ~mirror[page] || memcmp(ram[page], expected, PAGE_BYTES))
		return corrupt(page, by);
	return true;
}

static void touch(uint32_t page)
{
	uint32_t count = shadow[page];
	uint64_t before = last_ns;

	if (count != ~mirror[page] || !marks_hold(page, count)) {
		corrupt(page, "touch");
		count = shadow[page];
	}
	count_is(page, count + 1);
	if (blank(page, count) || blank(page, count + 1))
		fill(ram[page], page, count + 1);
	else
		write_marks(ram[page], page, count + 1);
	stats.touched++;
	stall(lap(0) - before);
}

/* ---------------------------------------------------------------------------------------------------- tests */

/* Damages a page in one of the ways in which a migration could; whoever runs it sees that it is noticed. */
static void damage(const char *kind, uint32_t page)
{
	uint64_t old[WORDS];
	char *bytes = (char *)ram[page];
	uint32_t old_shadow = shadow[page];

	memcpy(old, ram[page], PAGE_BYTES);
	if (!strcmp(kind, "flip")) {
		bytes[1001] ^= 4;
	} else if (!strcmp(kind, "zero")) {
		memset(bytes, 0, PAGE_BYTES);
	} else if (!strcmp(kind, "foreign")) {
		memcpy(bytes, ram[page ? page - 1 : 1], PAGE_BYTES);
	} else if (!strcmp(kind, "stale")) {
		touch(page);
		memcpy(bytes, old, PAGE_BYTES);
	} else if (!strcmp(kind, "half")) {
		touch(page);
		memcpy(bytes + PAGE_BYTES / 2, (char *)old + PAGE_BYTES / 2, PAGE_BYTES / 2);
	} else if (!strcmp(kind, "tail")) {
		touch(page);
		memcpy(bytes + PAGE_BYTES - 64, (char *)old + PAGE_BYTES - 64, 64);
	} else if (!strcmp(kind, "shadow")) {
		touch(page);
		shadow[page] = old_shadow;
	} else if (!strcmp(kind, "mirror")) {
		touch(page);
		mirror[page] = ~old_shadow;
	} else {
		say("{\"error\":\"unknown damage\"}");
		return;
	}
	say("{\"damaged\":%u}", page);
}

/* ------------------------------------------------------------------------------------------------- commands */

static void power_off(void)
{
#ifdef SELFTEST
	exit(0);
#else
	reboot(RB_POWER_OFF);
#endif
}

/* The answer to `check`, kept until the port takes it. */
static struct {
	bool waiting;
	uint64_t corrupt, ms;
} answer;

static void full_check(void)
{
	uint64_t before = lap(0), had = stats.corrupt;

	for (uint32_t page = 0; page < pages; page++)
		check_whole(page, "check");
	answer.ms = (lap(UINT64_MAX) - before) / MS;
	answer.corrupt = stats.corrupt - had;
	answer.waiting = true;
}

static void obey(const char *line)
{
	char kind[16];
	unsigned int page;
	long long rate;

	if (!strcmp(line, "check"))
		full_check();
	else if (!strcmp(line, "poweroff"))
		power_off();
	else if (sscanf(line, "rate %lld", &rate) == 1)
		config.rate = rate;
	else if (sscanf(line, "damage %15s %u", kind, &page) == 2 && page < pages)
		damage(kind, page);
	else if (*line)
		say("{\"error\":\"unknown command\"}");
}

static void read_commands(void)
{
	static char line[64];
	static size_t length;
	ssize_t got;
	char byte;

	while ((got = read(serial_in, &byte, 1)) == 1) {
		if (byte == '\n' || byte == '\r') {
			line[length] = 0;
			length = 0;
			obey(line);
		} else if (length < sizeof(line) - 1) {
			line[length++] = byte;
		}
	}
#ifdef SELFTEST
	if (got == 0)
		power_off();
#endif
}

/* ------------------------------------------------------------------------------------------------- the loop */

static void report(uint64_t interval)
{
	static uint64_t touched_before;
	char hist[BUCKETS * 12] = "";
	int last = BUCKETS - 1, length = 0;
	double rate = (double)(stats.touched - touched_before) / PAGES_PER_MIB / ((double)interval / SECOND);

	touched_before = stats.touched;
	while (last && !stats.hist[last])
		last--;
	for (int i = 0; i <= last && length < (int)sizeof(hist) - 24; i++)
		length += snprintf(hist + length, sizeof(hist) - length, i ? ",%llu" : "%llu",
				   (unsigned long long)stats.hist[i]);
	/* A report must stay valid JSON within one line; the histogram is what can be done without. */
	if (length > 125)
		*hist = 0;
	if (say("{\"seq\":%llu,\"uptime_ms\":%llu,\"pages\":%u,\"touched\":%llu,\"checked\":%llu,\"sweeps\":%llu,"
		"\"corrupt\":%llu,\"dropped\":%llu,\"rate_mib_s\":%.1f,\"stall_max_us\":%llu,\"stall_worst_us\":%llu,"
		"\"gap_max_us\":%llu,\"stall_hist\":[%s]}",
		(unsigned long long)++stats.seq, (unsigned long long)(last_ns / MS), pages,
		(unsigned long long)stats.touched, (unsigned long long)stats.checked, (unsigned long long)stats.sweeps,
		(unsigned long long)stats.corrupt, (unsigned long long)stats.dropped, rate,
		(unsigned long long)stats.stall_max, (unsigned long long)stats.stall_worst,
		(unsigned long long)stats.gap_max / 1000, hist))
		stats.stall_max = stats.gap_max = 0;
}

static uint32_t next_page(void)
{
	static uint32_t position;
	static uint64_t state;
	uint64_t random;

	if (config.pattern == SEQ)
		return position = position + 1 < dirty_pages ? position + 1 : 0;
	random = mix(state++ ^ config.seed << 40);
	/* Nine of ten writes go to the hot pages. */
	if (config.pattern == HOT && (random >> 56) < 230)
		return (random & UINT32_MAX) * hot_pages >> 32;
	return (random & UINT32_MAX) * dirty_pages >> 32;
}

static void dirty(uint64_t passed)
{
	static double owed;
	uint64_t batch = 256;

	if (config.rate < 0 || !dirty_pages)
		return;
	if (config.rate > 0) {
		double per_ns = (double)config.rate * PAGES_PER_MIB / SECOND;

		/* What a stall kept it from writing is not made up for, or it would be followed by a burst. */
		owed += per_ns * (double)(passed < 100 * MS ? passed : 100 * MS);
		batch = owed < 4096 ? (uint64_t)owed : 4096;
		owed -= (double)batch;
		if (owed > 4096)
			owed = 4096;
	}
	while (batch--)
		touch(next_page());
}

static void sweep(uint64_t passed)
{
	static double owed;
	static uint32_t page;

	if (!config.sweep_s)
		return;
	owed += (double)pages * (double)(passed < 100 * MS ? passed : 100 * MS) / (double)(config.sweep_s * SECOND);
	for (; owed >= 1; owed -= 1) {
		uint64_t before = last_ns;

		check_whole(page, "sweep");
		stall(lap(0) - before);
		if (++page == pages) {
			page = 0;
			stats.sweeps++;
		}
	}
}

static void *allocate(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	mlock(memory, bytes);
	return memory;
}

/* Takes memory and gives it back again, so that there is free memory of which the kernel can tell its hypervisor. */
static void churn(void)
{
	static uint64_t changed;
	static void *taken;
	size_t bytes = (size_t)config.churn_mib << 20;

	if (!config.churn_mib || last_ns - changed < (taken ? 2 : 8) * SECOND)
		return;
	changed = last_ns;
	if (taken)
		munmap(taken, bytes);
	taken = taken ? NULL : allocate(bytes);
	lap(UINT64_MAX);
}

static void loop(void)
{
	uint64_t before = last_ns, reported = last_ns, read_at = 0;

	for (;;) {
		uint64_t begin = lap(0), passed = begin - before;

		before = begin;
		dirty(passed);
		sweep(passed);
		churn();
		if (last_ns - read_at > 20 * MS) {
			read_at = last_ns;
			read_commands();
		}
		if (answer.waiting)
			answer.waiting = !say("{\"full_check\":true,\"pages\":%u,\"corrupt\":%llu,\"corrupt_total\":%llu,"
					      "\"ms\":%llu}", pages, (unsigned long long)answer.corrupt,
					      (unsigned long long)stats.corrupt, (unsigned long long)answer.ms);
		if (config.report_s && last_ns - reported >= config.report_s * SECOND) {
			report(last_ns - reported);
			reported = last_ns;
		}
		if (config.rate) {
			uint64_t used = lap(0) - begin, tick = config.tick_ms * MS;

			if (used < tick) {
				struct timespec rest = { .tv_nsec = tick - used };

				nanosleep(&rest, NULL);
				lap(tick - used);
			}
		}
	}
}

/* ---------------------------------------------------------------------------------------------------- start */

static void read_word(const char *word)
{
	static const struct {
		const char *name;
		uint64_t *value;
	} numbers[] = {
		{ "mib", &config.mib },		  { "bloat_mib", &config.bloat_mib },
		{ "zero_mib", &config.zero_mib }, { "hot_mib", &config.hot_mib },
		{ "seed", &config.seed },	  { "report", &config.report_s },
		{ "sweep", &config.sweep_s },	  { "tick", &config.tick_ms },
		{ "zero_every", &config.zero_every }, { "available_mib", &config.available_mib },
		{ "churn_mib", &config.churn_mib },
	};
	const char *value = strchr(word, '=');
	size_t length;

	if (strncmp(word, "dirty.", 6) || !value)
		return;
	word += 6;
	length = value++ - word;
	for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); i++)
		if (strlen(numbers[i].name) == length && !strncmp(word, numbers[i].name, length)) {
			*numbers[i].value = strtoull(value, NULL, 0);
			return;
		}
	if (length == 4 && !strncmp(word, "rate", 4)) {
		config.rate = strtoll(value, NULL, 0);
		return;
	}
	if (length == 7 && !strncmp(word, "pattern", 7))
		for (int i = 0; i < 3; i++)
			if (!strcmp(value, pattern_names[i])) {
				config.pattern = i;
				return;
			}
	say("{\"error\":\"unknown word\",\"word\":\"dirty.%.*s\"}", (int)length, word);
}

static uint64_t available_mib(void)
{
	FILE *file = fopen("/proc/meminfo", "r");
	unsigned long long kib = 0;
	char line[128];

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "MemAvailable: %llu", &kib) == 1)
			break;
	if (file)
		fclose(file);
	return config.available_mib ? config.available_mib : kib / 1024;
}

static uint64_t take(uint64_t wanted, uint64_t *left)
{
	uint64_t taken = wanted < *left ? wanted : *left;

	*left -= taken;
	return taken;
}

static bool prepare(void)
{
	uint64_t wanted = config.mib + config.bloat_mib + config.zero_mib, had = available_mib();
	uint64_t left = had > RESERVE_MIB ? had - RESERVE_MIB : 0;

	/* Longer, and a slow guest would not make up for the time it slept (see dirty). */
	config.tick_ms = config.tick_ms < 100 ? config.tick_ms : 100;
	/* The two counters take 8 bytes a page. */
	left -= left ? left / 512 + 1 : 0;
	config.mib = take(config.mib, &left);
	config.bloat_mib = take(config.bloat_mib, &left);
	config.zero_mib = take(config.zero_mib, &left);
	if (config.mib + config.bloat_mib + config.zero_mib < wanted)
		say("{\"warning\":\"memory\",\"wanted_mib\":%llu,\"available_mib\":%llu,\"using_mib\":%llu}",
		    (unsigned long long)wanted, (unsigned long long)had,
		    (unsigned long long)(config.mib + config.bloat_mib + config.zero_mib));

	dirty_pages = config.mib * PAGES_PER_MIB;
	zero_from = dirty_pages + config.bloat_mib * PAGES_PER_MIB;
	pages = zero_from + config.zero_mib * PAGES_PER_MIB;
	hot_pages = config.hot_mib < config.mib && config.hot_mib ? config.hot_mib * PAGES_PER_MIB : dirty_pages;
	if (!pages)
		return false;
	for (int k = 0; k < MARKS; k++)
		keys[k] = mix(config.seed * MARKS + k);
	ram = allocate((size_t)pages * PAGE_BYTES);
	shadow = allocate(pages * sizeof(*shadow));
	mirror = allocate(pages * sizeof(*mirror));
	if (!ram || !shadow || !mirror)
		return false;
	for (uint32_t page = 0; page < pages; page++) {
		count_is(page, 0);
		fill(ram[page], page, 0);
	}
	return true;
}

#ifdef SELFTEST
static void start(int argc, char **argv)
{
	serial_in = 0;
	serial_out = 1;
	fcntl(0, F_SETFL, O_NONBLOCK);
	fcntl(1, F_SETFL, O_NONBLOCK);
	for (int i = 1; i < argc; i++)
		read_word(argv[i]);
}
#else
/* Loads what is in /modules, in the order of the names. */
static void load_modules(void)
{
	struct dirent **entries;
	int n = scandir("/modules", &entries, NULL, alphasort);

	for (int i = 0; i < n; i++) {
		char path[300];
		int file;

		snprintf(path, sizeof(path), "/modules/%s", entries[i]->d_name);
		file = open(path, O_RDONLY);
		if (entries[i]->d_type != DT_DIR && (file < 0 || syscall(SYS_finit_module, file, "", 0)))
			say("{\"error\":\"module\",\"path\":\"%s\",\"errno\":%d}", path, errno);
		close(file);
	}
}

static void start(int argc, char **argv)
{
	static char words[4096];
	struct termios raw;
	ssize_t length;
	int file;

	(void)argc;
	(void)argv;
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	serial_in = serial_out = open("/dev/ttyS0", O_RDWR | O_NONBLOCK | O_NOCTTY);
	if (tcgetattr(serial_in, &raw) == 0) {
		cfmakeraw(&raw);
		raw.c_cflag |= CLOCAL | CREAD;
		tcsetattr(serial_in, TCSANOW, &raw);
	}
	file = open("/proc/cmdline", O_RDONLY);
	length = read(file, words, sizeof(words) - 1);
	close(file);
	words[length > 0 ? length : 0] = 0;
	for (char *word = strtok(words, " \n"); word; word = strtok(NULL, " \n"))
		read_word(word);
	load_modules();
}
#endif

int main(int argc, char **argv)
{
	start(argc, argv);
	start_clock();
	if (!prepare()) {
		say("{\"error\":\"no memory\",\"available_mib\":%llu}", (unsigned long long)available_mib());
		sleep(1); /* let the line out */
		power_off();
		return 1;
	}
	lap(UINT64_MAX);
	say("{\"started\":true,\"uptime_ms\":%llu,\"pages\":%u,\"mib\":%llu,\"bloat_mib\":%llu,\"zero_mib\":%llu,"
	    "\"pattern\":\"%s\",\"rate\":%lld,\"seed\":%llu,\"clock\":\"%s\",\"available_mib\":%llu}",
	    (unsigned long long)(last_ns / MS), pages, (unsigned long long)config.mib,
	    (unsigned long long)config.bloat_mib, (unsigned long long)config.zero_mib, pattern_names[config.pattern],
	    (long long)config.rate, (unsigned long long)config.seed, tsc.use ? "tsc" : "monotonic",
	    (unsigned long long)available_mib());
	loop();
}
