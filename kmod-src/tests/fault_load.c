// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Touches pages of a remote_ram file that are missing, and says how long each
 * touch took and whether the contents are right.
 *
 *   fault_load --fill FILE            write what is expected later
 *   fault_load FILE                   touch, compare, print JSON
 *
 *   --threads 1,4,16   one run for each number of threads (1)
 *   --count 256        pages of one run; every run takes others
 *   --order random     or sequential
 *   --first 0          first page, and number of pages, to choose from:
 *   --pages N          all
 *   --seed 1           what the pages hold, and the order
 *
 * That a page is missing is up to the caller: background pull and bubble are
 * stopped by RRAM_IOC_TUNE. Exits with 1 if a page was wrong.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "load.h"

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "fill", no_argument, NULL, 'f' },
		{ "threads", required_argument, NULL, 't' },
		{ "count", required_argument, NULL, 'c' },
		{ "order", required_argument, NULL, 'o' },
		{ "first", required_argument, NULL, 'a' },
		{ "pages", required_argument, NULL, 'n' },
		{ "seed", required_argument, NULL, 's' },
		{ }
	};
	unsigned long first = 0, nr = 0, count = 256, pages, bad = 0;
	unsigned int threads[16] = { 1 }, runs = 1, i;
	bool fill = false, shuffled = true;
	uint64_t seed = 1;
	unsigned long *page;
	struct stat st;
	char *base;
	int c, fd;

	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (c == 'f')
			fill = true;
		else if (c == 't')
			runs = load_list(optarg, threads, 16);
		else if (c == 'c')
			count = strtoul(optarg, NULL, 10);
		else if (c == 'o')
			shuffled = strcmp(optarg, "sequential");
		else if (c == 'a')
			first = strtoul(optarg, NULL, 10);
		else if (c == 'n')
			nr = strtoul(optarg, NULL, 10);
		else if (c == 's')
			seed = strtoul(optarg, NULL, 10);
		else
			return 2;
	}
	if (optind != argc - 1) {
		fprintf(stderr, "usage: %s [options] FILE\n", argv[0]);
		return 2;
	}
	fd = open(argv[optind], O_RDWR);
	if (fd < 0 || fstat(fd, &st))
		die(argv[optind], errno);
	pages = st.st_size / PAGE;
	base = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (base == MAP_FAILED)
		die("mmap", errno);
	if (fill) {
		load_fill(base, 0, pages, seed);
		printf("{\"pages\": %lu}\n", pages);
		return 0;
	}
	if (!nr)
		nr = pages - first;
	if (first + nr > pages || !count || count * runs > nr)
		die("the file has not so many pages", EINVAL);

	page = load_pages(first, nr, shuffled, seed);
	printf("{\"order\": \"%s\", \"runs\": [", shuffled ? "random" : "sequential");
	for (i = 0; i < runs; i++) {
		printf("%s", i ? ", " : "");
		bad += load_run(&(struct load){
			.base = base,
			.page = page + i * count,
			.nr = count,
			.threads = threads[i],
			.seed = seed,
		});
	}
	printf("]}\n");
	return bad ? 1 : 0;
}
