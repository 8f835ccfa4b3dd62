/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The order in which pages go: one, for both phases of a migration.
 *
 * Pure functions over plain memory, without a kernel service behind them, so
 * that the same file is compiled in user space for its tests and simulator.
 */
#ifndef _RRAM_ORDER_H
#define _RRAM_ORDER_H

#ifdef __KERNEL__
#include <linux/bitmap.h>
#include <linux/minmax.h>
#include <linux/string.h>
#include <linux/types.h>
#else
#include "order_user.h"
#endif

/*
 * Heat of a page: how lately it was dirtied. The source counts rounds; the
 * class is what travels to the destination at the switch.
 */
enum rram_heat {
	RRAM_HEAT_COLD = 0,	/* never seen dirty after its first copy */
	RRAM_HEAT_COOL,		/* dirtied eight or more rounds ago */
	RRAM_HEAT_WARM,		/* dirtied two to seven rounds ago */
	RRAM_HEAT_HOT,		/* dirtied in this round or the last */
	RRAM_HEAT_CLASSES,
};

/* A run of pages; it never crosses a chunk, because one memory key covers one. */
struct rram_run {
	unsigned long first;
	unsigned int nr;	/* 0: there is none */
};

#define RRAM_CHUNK_PAGES 128U
#define RRAM_PIVOTS 16

/**
 * struct rram_order - what the pull knows about who waits where
 * @npages: pages of the file
 * @cursor: for each heat, where the scan stands; all before it was looked at
 * @pivot: where demand faults were, the newest first
 * @nr_pivots: how many of them are in use
 * @turn: which pivot is served next
 * @newest: the next run goes to the newest pivot, not to the one in turn
 */
struct rram_order {
	unsigned long npages;
	unsigned long cursor[RRAM_HEAT_CLASSES];
	struct rram_pivot {
		unsigned long below;	/* all in [below, above) was looked at */
		unsigned long above;
		unsigned int size;	/* what its budget was when last filled */
		unsigned int left;	/* pages its bubble may still take */
		int trend;		/* > 0: its faults go up, < 0: down */
		bool up;		/* which side is next, without a trend */
	} pivot[RRAM_PIVOTS];
	unsigned int nr_pivots;
	unsigned int turn;
	bool newest;
};

/* What a page that is found dirty in @round (from 1 on) is marked with. */
u8 rram_round_mark(unsigned int round);
enum rram_heat rram_heat_of(unsigned int round, u8 dirtied);

/* Pre-copy: the next run of pages in @map of the given heat, from @from on. */
struct rram_run rram_order_offer(const unsigned long *map, const u8 *dirtied,
				 unsigned int round, bool hot,
				 unsigned long from, unsigned long end,
				 unsigned int max);

/* The pull. All of it is called under one lock. */
void rram_order_init(struct rram_order *o, unsigned long npages);
void rram_order_fault(struct rram_order *o, unsigned long page);
void rram_order_failed(struct rram_order *o, unsigned long first);
struct rram_run rram_order_next(struct rram_order *o,
				const unsigned long *missing,
				const unsigned long *inflight,
				const u8 *heat, unsigned int max,
				bool *bubble);

/**
 * rram_order_idle() - whether there is nothing to fetch
 * @o: the order
 * @run: what rram_order_next() returned
 *
 * One call looks at a bounded number of pages, so that the lock is never held
 * for long. It may return an empty run before it has looked at all of them:
 * then this is false, and the caller drops the lock and asks again.
 */
static inline bool rram_order_idle(const struct rram_order *o,
				   struct rram_run run)
{
	return !run.nr && run.first >= o->npages;
}

#endif /* _RRAM_ORDER_H */
