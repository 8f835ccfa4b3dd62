// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * What can be seen from outside, and faults that are injected on purpose.
 *
 * /sys/kernel/debug/remote_ram/
 *	sessions/<inode>	statistics of one session, for people
 *	inject_delay_us		each demand READ is posted so much later
 *	inject_drop		writing 1 breaks all connections, once
 *	inject_fail		one READ in so many counts as failed
 */
#include <linux/debugfs.h>
#include <linux/seq_file.h>

#include "remote_ram.h"

static struct dentry *rram_debug_dir;
static struct dentry *rram_debug_sessions;
unsigned int rram_inject_delay_us;
static unsigned int rram_inject_fail;
static atomic_t rram_completions;

/* All sessions that are shown, for inject_drop. */
static DEFINE_MUTEX(rram_debug_lock);
static LIST_HEAD(rram_debug_list);

struct rram_debug_entry {
	struct list_head list;
	struct rram_session *s;
	struct dentry *dentry;
};

bool rram_inject_failure(void)
{
	unsigned int every = READ_ONCE(rram_inject_fail);

	return every && atomic_inc_return(&rram_completions) % every == 0;
}

void rram_count_hist(atomic64_t *hist, u64 ns)
{
	unsigned int bucket = fls64(div_u64(ns, NSEC_PER_USEC));

	atomic64_inc(&hist[min(bucket, RRAM_HIST_BUCKETS - 1U)]);
}

void rram_stats(struct rram_session *s, struct rram_stats *st)
{
	struct rram_counters *c = &s->count;
	enum rram_reason reason;
	unsigned int i;

	st->role = s->role;
	st->state = rram_get_state(s, &reason);
	st->reason = reason;
	st->pages = s->f->npages;
/* A counter and the field of the same name. */
#define RRAM_COPY(name) (st->name = atomic64_read(&c->name))
	RRAM_COPY(pages_ahead);
	RRAM_COPY(pages_zero);
	RRAM_COPY(pages_demand);
	RRAM_COPY(pages_bubble);
	RRAM_COPY(pages_background);
	RRAM_COPY(pages_stale);
	RRAM_COPY(pages_lost);
	RRAM_COPY(bytes_ahead);
	RRAM_COPY(bytes_after);
	RRAM_COPY(faults_nowait);
	RRAM_COPY(faults_retry);
	RRAM_COPY(faults_plain);
	RRAM_COPY(faults_joined);
	RRAM_COPY(faults_poison);
	RRAM_COPY(wait_ns_total);
	RRAM_COPY(wait_ns_max);
	RRAM_COPY(read_ns_total);
	RRAM_COPY(reconnects);
	RRAM_COPY(keys);
	RRAM_COPY(keys_retired);
#undef RRAM_COPY
	for (i = 0; i < RRAM_HIST_BUCKETS; i++) {
		st->wait_hist[i] = atomic64_read(&c->wait_hist[i]);
		st->read_hist[i] = atomic64_read(&c->read_hist[i]);
	}
	st->pages_missing = s->role == RRAM_ROLE_DESTINATION ?
			    rram_lacking(s->f) : 0;
	if (s->role == RRAM_ROLE_SOURCE)
		rram_source_stats(s, st);
	else
		rram_dest_stats(s, st);
	st->memory += sizeof(*s) + 4 * BITS_TO_LONGS(s->f->npages) *
		      sizeof(long) + s->f->npages;
	if (s->bufs)
		st->memory += (2 * RRAM_MSG_DEPTH + RRAM_MSG_SPARE) *
			      (RRAM_MSG_SIZE + sizeof(struct rram_buf));
}

static void rram_show_hist(struct seq_file *m, const char *name, const u64 *hist)
{
	unsigned int i;

	seq_printf(m, "%s:", name);
	for (i = 0; i < RRAM_HIST_BUCKETS; i++)
		if (hist[i])
			seq_printf(m, " <%luus=%llu", 1UL << i, hist[i]);
	seq_putc(m, '\n');
}

static int rram_session_show(struct seq_file *m, void *v)
{
	struct rram_session *s = m->private;
	struct rram_stats *st = kzalloc(sizeof(*st), GFP_KERNEL);

	if (!st)
		return -ENOMEM;
	rram_stats(s, st);
	seq_printf(m, "role: %u\nstate: %u\nreason: %u\n", st->role, st->state,
		   st->reason);
#define RRAM_SHOW(name) seq_printf(m, #name ": %llu\n", st->name)
	RRAM_SHOW(pages);
	RRAM_SHOW(pages_missing);
	RRAM_SHOW(pages_dirty);
	RRAM_SHOW(pages_ahead);
	RRAM_SHOW(pages_zero);
	RRAM_SHOW(pages_demand);
	RRAM_SHOW(pages_bubble);
	RRAM_SHOW(pages_background);
	RRAM_SHOW(pages_stale);
	RRAM_SHOW(pages_lost);
	RRAM_SHOW(bytes_ahead);
	RRAM_SHOW(bytes_after);
	RRAM_SHOW(late_writes);
	RRAM_SHOW(faults_nowait);
	/* Of those, for which a READ was begun at once. */
	seq_printf(m, "faults_begun: %lld\n",
		   atomic64_read(&s->count.faults_begun));
	RRAM_SHOW(faults_retry);
	RRAM_SHOW(faults_plain);
	RRAM_SHOW(faults_joined);
	RRAM_SHOW(faults_poison);
	RRAM_SHOW(wait_ns_total);
	RRAM_SHOW(wait_ns_max);
	RRAM_SHOW(read_ns_total);
	RRAM_SHOW(reconnects);
	RRAM_SHOW(keys);
	RRAM_SHOW(keys_retired);
	RRAM_SHOW(switch_us);
	RRAM_SHOW(precopy_us);
	RRAM_SHOW(rate);
	RRAM_SHOW(memory);
#undef RRAM_SHOW
	seq_printf(m, "rounds: %u\n", st->rounds);
	rram_show_hist(m, "wait", st->wait_hist);
	rram_show_hist(m, "read", st->read_hist);
	kfree(st);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(rram_session);

static int rram_drop_set(void *data, u64 value)
{
	struct rram_debug_entry *e;

	mutex_lock(&rram_debug_lock);
	list_for_each_entry(e, &rram_debug_list, list) {
		if (!value)
			continue;
		WRITE_ONCE(e->s->broken, true);
		rram_poke(e->s);
	}
	mutex_unlock(&rram_debug_lock);
	return 0;
}
DEFINE_DEBUGFS_ATTRIBUTE(rram_drop_fops, NULL, rram_drop_set, "%llu\n");

void rram_debug_add(struct rram_session *s)
{
	struct rram_debug_entry *e = kzalloc(sizeof(*e), GFP_KERNEL);
	char name[24];

	if (!e)
		return;		/* it is not shown, that is all */
	e->s = s;
	snprintf(name, sizeof(name), "%llu", (u64)s->f->inode.i_ino);
	e->dentry = debugfs_create_file(name, 0400, rram_debug_sessions, s,
					&rram_session_fops);
	mutex_lock(&rram_debug_lock);
	list_add(&e->list, &rram_debug_list);
	mutex_unlock(&rram_debug_lock);
}

void rram_debug_remove(struct rram_session *s)
{
	struct rram_debug_entry *e, *found = NULL;

	mutex_lock(&rram_debug_lock);
	list_for_each_entry(e, &rram_debug_list, list) {
		if (e->s != s)
			continue;
		list_del(&e->list);
		found = e;
		break;
	}
	mutex_unlock(&rram_debug_lock);
	if (!found)
		return;
	/* Waits for those who are reading it, and who may fault meanwhile. */
	debugfs_remove(found->dentry);
	kfree(found);
}

void rram_debug_init(void)
{
	rram_debug_dir = debugfs_create_dir("remote_ram", NULL);
	rram_debug_sessions = debugfs_create_dir("sessions", rram_debug_dir);
	debugfs_create_u32("inject_delay_us", 0600, rram_debug_dir,
			   &rram_inject_delay_us);
	debugfs_create_u32("inject_fail", 0600, rram_debug_dir,
			   &rram_inject_fail);
	debugfs_create_file_unsafe("inject_drop", 0200, rram_debug_dir, NULL,
				   &rram_drop_fops);
}

void rram_debug_exit(void)
{
	debugfs_remove_recursive(rram_debug_dir);
}
