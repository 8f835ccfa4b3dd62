/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * remote_ram, inside. Which file does what, the order of the locks and who
 * owns what is in ../README.md.
 */
#ifndef _RRAM_H
#define _RRAM_H

#include <linux/fs.h>
#include <linux/kref.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/rwsem.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <rdma/ib_verbs.h>
#include <rdma/rdma_cm.h>
#include <rdma/rw.h>

#include "order.h"
#include "wire.h"

#define RRAM_TICK		(HZ / 10)	/* longest sleep of a thread */
#define RRAM_WAITS		64	/* wait queues of a file, pages share them */
#define RRAM_URGENT_DEPTH	128	/* demand READs under way in a session */
#define RRAM_BULK_DEPTH		4	/* background READs under way */
#define RRAM_BATCH_MAX		RRAM_CHUNK_PAGES
#define RRAM_WINDOW		16	/* offers under way */

/**
 * enum rram_phase - what a missing bit means to a fault
 * @RRAM_PHASE_PLAIN: nothing; all pages are here
 * @RRAM_PHASE_AHEAD: destination before the switch: a page that is here may
 *	become missing, so looking and mapping is done under rram_file.stale
 * @RRAM_PHASE_AFTER: destination after the switch: bits are only cleared
 * @RRAM_PHASE_LOST: what is missing will not come
 * @RRAM_PHASE_FAILED: ended before the switch; what is missing never came
 */
enum rram_phase {
	RRAM_PHASE_PLAIN,
	RRAM_PHASE_AHEAD,
	RRAM_PHASE_AFTER,
	RRAM_PHASE_LOST,
	RRAM_PHASE_FAILED,
};

struct rram_session;

/**
 * struct rram_file - a block of guest RAM
 * @inode: what the VFS knows of it
 * @shmem: the file that holds its pages; ours alone
 * @control: sessions coming and going, size. Outside of the memory map's lock
 * @lock: mappings coming and going. Inside of the memory map's lock
 * @session: the session it is in; RCU protects readers
 * @npages: size in pages; fixed while there is a session
 * @nr_maps: number of VMAs, under @lock
 * @phase: see enum rram_phase
 * @tracking: writes are noted in @dirty
 * @frozen: the VM has left; writes are counted in @late_writes
 * @large: a large folio was made writable since tracking began
 * @dirty: source: pages that the destination does not have. Destination
 *	before the switch: pages that were written here
 * @missing: destination: pages that are not here. Source after the switch:
 *	pages that the destination lacked
 * @inflight: destination: pages for which a READ is under way; whoever sets a
 *	bit owns the page until it is cleared
 * @heat: source: round in which a page was last found dirty. Destination:
 *	its enum rram_heat
 * @lost: destination: pages that are missing and that the source can't read;
 *	their bits in @inflight stay taken
 * @nr_missing: bits in @missing
 * @nr_lost: bits in @lost
 * @late_writes: writes after the file was frozen
 * @stale: held for writing while pages become missing
 * @wait: where those sleep who wait for a page
 */
struct rram_file {
	struct inode inode;
	struct file *shmem;
	struct mutex control;	/* session, size */
	struct mutex lock;	/* nr_maps */
	struct rram_session __rcu *session;
	unsigned long npages;
	unsigned int nr_maps;
	enum rram_phase phase;
	bool tracking;
	bool frozen;
	bool large;
	unsigned long *dirty;
	unsigned long *missing;
	unsigned long *inflight;
	unsigned long *lost;
	u8 *heat;
	atomic_long_t nr_missing;
	atomic_long_t nr_lost;
	atomic64_t late_writes;
	struct rw_semaphore stale;
	wait_queue_head_t wait[RRAM_WAITS];
};

static inline struct rram_file *rram_file_of(struct inode *inode)
{
	return container_of(inode, struct rram_file, inode);
}

static inline struct inode *rram_inner(struct rram_file *f)
{
	return file_inode(f->shmem);
}

/* Pages that are missing and may come. */
static inline long rram_lacking(struct rram_file *f)
{
	long missing = atomic_long_read(&f->nr_missing);

	/*
	 * In this order, as who punches a lost page out counts it down the other
	 * way: what is seen between the two is too many, never too few.
	 */
	smp_rmb();
	return missing - atomic_long_read(&f->nr_lost);
}

/* Counters of a session; a copy of struct rram_stats is filled from them. */
struct rram_counters {
	atomic64_t pages_ahead, pages_zero, pages_demand, pages_bubble;
	atomic64_t pages_background, pages_stale, pages_lost;
	atomic64_t bytes_ahead, bytes_after;
	atomic64_t faults_nowait, faults_retry, faults_plain, faults_joined;
	atomic64_t faults_poison;
	atomic64_t faults_begun;	/* shown in debugfs alone */
	atomic64_t wait_ns_total, wait_ns_max, read_ns_total;
	atomic64_t reconnects, keys, keys_retired;
	atomic64_t wait_hist[RRAM_HIST_BUCKETS];
	atomic64_t read_hist[RRAM_HIST_BUCKETS];
};

/* Why a page is fetched. */
enum rram_cause {
	RRAM_CAUSE_AHEAD,
	RRAM_CAUSE_DEMAND,
	RRAM_CAUSE_BUBBLE,
	RRAM_CAUSE_BACKGROUND,
};

struct rram_offer;

/**
 * struct rram_fetch - one READ
 * @cqe: completion
 * @list: in the free list of its kind
 * @s: its session
 * @first: first page
 * @nr: number of pages, all in one chunk
 * @cause: why
 * @bulk: of which kind
 * @offer: what it answers, if it was offered
 * @posted: when
 * @under_way: its completion has not come
 * @by_rw: @rw is in use, and not @wr with @sge
 * @rw: READ into several pages, or where the sink needs a key of its own
 * @wr: READ into one page
 * @sge: the page
 * @sg: the pages, for @rw
 * @folio: the pages, locked until the READ has ended
 */
struct rram_fetch {
	struct ib_cqe cqe;
	struct list_head list;
	struct rram_session *s;
	unsigned long first;
	unsigned int nr;
	enum rram_cause cause;
	bool bulk;
	struct rram_offer *offer;
	ktime_t posted;
	bool under_way;
	bool by_rw;
	struct rdma_rw_ctx rw;
	struct ib_rdma_wr wr;
	struct ib_sge sge;
	struct scatterlist *sg;
	struct folio **folio;
};

/**
 * struct rram_place - somebody's place in the queue for a READ of one page
 * @list: in rram_dest.queue
 * @index: the page they wait for
 * @fetch: what was handed over to them
 * @taken: one of the two above is or was set; the owner's own
 */
struct rram_place {
	struct list_head list;
	unsigned long index;
	struct rram_fetch *fetch;
	bool taken;
};

/* A message's buffer; @after: registrations that have to be made before it. */
struct rram_buf {
	struct ib_cqe cqe;
	struct list_head list;
	struct rram_session *s;
	u64 dma;
	unsigned int bytes;
	u32 after;
	void *data;
};

/**
 * struct rram_link - one of the two connections
 * @s: its session
 * @id: communication identifier, with the queue pair
 * @cq: completion queue
 * @complete: how the core handles what it tells of, see rram_completion()
 * @stage: how far connecting has got: the last event's enum rdma_cm_event_type
 * @failed: it will not get further
 * @reason: enum rram_reason, with @failed
 * @up: established
 * @proof: source: what the destination's answer has to prove, of this request
 * @sink_keys: READs on it need a key for where they write
 */
struct rram_link {
	struct rram_session *s;
	struct rdma_cm_id *id;
	struct ib_cq *cq;
	ib_comp_handler complete;
	int stage;
	bool failed;
	int reason;
	bool up;
	__le64 proof;
	bool sink_keys;
};

/* A request to connect that the session's thread has not looked at yet. */
struct rram_request {
	struct list_head list;
	struct rdma_cm_id *id;
	struct rram_hello hello;
	u8 depth;		/* READs that the peer answers at once */
	bool gone;
};

struct rram_source;
struct rram_dest;

/**
 * struct rram_session - one migration of one file
 * @ref: the file's, and one for each fault that waits
 * @rcu: for rram_file.session
 * @f: the file; outlives @thread
 * @role: RRAM_ROLE_*
 * @state_lock: @state and @reason
 * @state: enum rram_state
 * @reason: enum rram_reason
 * @aborted: somebody asked for an end
 * @taken_back: it was RRAM_IOC_TAKE_BACK
 * @over: the thread has given up everything
 * @thread: does all that is not done in a fault or a completion
 * @hurry: ends a wait of @thread in code that is not ours
 * @wake: where @thread sleeps
 * @poke: there is something for it to do
 * @changed: where those sleep who wait for a state
 * @net: network namespace of whoever made the session
 * @args: what the session was made with, defaults filled in
 * @epoch: number of the connection
 * @came: destination: the last that each link came with
 * @pause: ms until the source tries again
 * @sessions: in the list of those that a device has to ask before it goes
 * @dev: device of the connection, or of the one before
 * @evicted: it goes away, and all on it has to be given up
 * @virt_dma: it sees memory as we do
 * @pd: protection domain; nothing else is in it
 * @listener: destination: identifier that listens
 * @deaf: its device has gone
 * @requests: destination: struct rram_request, under @state_lock
 * @link: the two connections
 * @linked: both are up. Changed under @linksem for writing
 * @linksem: held for reading by whoever posts a READ
 * @broken: the connection failed and has to be taken down
 * @last_rx: when the peer was last heard, in jiffies
 * @last_tx: when it last heard from here
 * @lost_at: when the connection was lost
 * @tx: send buffers that are free, under @buf_lock
 * @rx: received messages, under @buf_lock
 * @unsent: messages that wait for registrations, in order; the thread's own
 * @bufs: all buffers of the connection
 * @buf_lock: @tx and @rx
 * @credits: messages that the peer has room for
 * @owed: receives posted since the last message
 * @regs: registrations posted on this connection; the thread's own
 * @regs_done: those that have ended
 * @busy_poll_us: see RRAM_TUNE_BUSY_POLL_US
 * @batch: see RRAM_TUNE_BATCH_PAGES
 * @background: see RRAM_TUNE_BACKGROUND
 * @tokens: bytes that the bandwidth limit allows now
 * @tokens_at: when @tokens was last filled
 * @src: what only a source has
 * @dst: what only a destination has
 * @count: statistics
 */
struct rram_session {
	struct kref ref;
	struct rcu_head rcu;
	struct rram_file *f;
	enum rram_role role;
	spinlock_t state_lock;	/* state, reason, requests */
	enum rram_state state;
	enum rram_reason reason;
	bool aborted;
	bool taken_back;
	bool over;
	struct task_struct *thread;
	struct delayed_work hurry;
	wait_queue_head_t wake;
	atomic_t poke;
	wait_queue_head_t changed;
	struct net *net;
	struct rram_session_args args;
	u32 epoch;
	u32 came[RRAM_LINKS];
	unsigned int pause;

	struct list_head sessions;
	struct ib_device *dev;
	bool evicted;
	bool virt_dma;
	struct ib_pd *pd;
	struct rdma_cm_id *listener;
	bool deaf;
	struct list_head requests;
	struct rram_link link[RRAM_LINKS];
	bool linked;
	struct rw_semaphore linksem;
	bool broken;
	unsigned long last_rx;
	unsigned long last_tx;
	unsigned long lost_at;

	struct list_head tx;
	struct list_head rx;
	struct list_head unsent;
	struct rram_buf *bufs;
	spinlock_t buf_lock;	/* tx, rx */
	int credits;
	unsigned int owed;
	u32 regs;
	atomic_t regs_done;

	unsigned int busy_poll_us;
	unsigned int batch;
	bool background;
	s64 tokens;
	ktime_t tokens_at;

	struct rram_source *src;
	struct rram_dest *dst;
	struct rram_counters count;
};

/* Parameters of the module, see main.c. */
extern unsigned int rram_busy_poll_us;
extern bool rram_sink_keys;

/* Injected faults, see debug.c. */
extern unsigned int rram_inject_delay_us;
bool rram_inject_failure(void);

/* fs.c */
int rram_fs_init(void);
void rram_fs_exit(void);
struct file *rram_shmem_new(const char *name, loff_t size);

/* file.c */
extern const struct file_operations rram_file_operations;
extern const struct inode_operations rram_file_inode_operations;
int rram_file_init(struct rram_file *f);
void rram_file_destroy(struct rram_file *f);
int rram_file_bitmaps(struct rram_file *f);
int rram_fill(struct rram_file *f, unsigned long first, unsigned long last);
int rram_allow_collapse(struct rram_file *f, pid_t nr);

/* track.c */
void rram_track_write(struct rram_file *f, unsigned long first,
		      unsigned long nr);
unsigned int rram_harvest(struct rram_session *s, unsigned long first,
			  const unsigned long *want, unsigned long *taken);
void rram_protect(struct rram_file *f, unsigned long first, unsigned long nr);
struct folio *rram_peek(struct rram_file *f, unsigned long index, int *err);
struct folio *rram_grab(struct rram_file *f, unsigned long index);

/* session.c */
struct rram_session *rram_session_new(struct rram_file *f, enum rram_role role,
				      struct rram_session_args *args);
void rram_session_put(struct rram_session *s);
struct rram_session *rram_session_get(struct rram_file *f);
void rram_session_start(struct rram_session *s);
void rram_session_cancel(struct rram_session *s);
void rram_session_end(struct rram_file *f);
void rram_set_state(struct rram_session *s, enum rram_state state,
		    enum rram_reason reason);
enum rram_state rram_get_state(struct rram_session *s, enum rram_reason *reason);
void rram_poke(struct rram_session *s);
int rram_wait_state(struct rram_session *s, u32 states, unsigned int ms);
bool rram_ended(enum rram_state state);
bool rram_switched(enum rram_state state);
bool rram_throttled(struct rram_session *s, u64 bytes);
void rram_unthrottle(struct rram_session *s, u64 bytes);
void rram_fail(struct rram_session *s, enum rram_reason reason);
void rram_wake_pages(struct rram_file *f);
void rram_wake_page(struct rram_file *f, unsigned long index);
void rram_wake_chunk(struct rram_file *f, unsigned long chunk);

/* link.c */
int rram_link_init(void);
void rram_link_exit(void);
void rram_list_session(struct rram_session *s);
void rram_unlist_session(struct rram_session *s);
int rram_listen(struct rram_session *s);
void rram_unlisten(struct rram_session *s);
int rram_connect(struct rram_session *s);
void rram_serve_requests(struct rram_session *s);
void rram_unlink(struct rram_session *s);
void rram_break(struct rram_session *s);
void rram_leave_device(struct rram_session *s);
bool rram_check_link(struct rram_session *s);
bool rram_can_send(struct rram_session *s);
struct rram_buf *rram_msg_new(struct rram_session *s, enum rram_msg_type type);
void rram_msg_send(struct rram_session *s, struct rram_buf *b,
		   unsigned int bytes);
void rram_msg_push(struct rram_session *s);
void rram_msg_flush(struct rram_session *s);
bool rram_say(struct rram_session *s, enum rram_msg_type type);
struct rram_buf *rram_msg_next(struct rram_session *s);
void rram_msg_done(struct rram_session *s, struct rram_buf *b);

/* export.c */
int rram_source_new(struct rram_session *s);
void rram_source_free(struct rram_session *s);
bool rram_key_holds(struct rram_session *s, unsigned long index,
		    struct page *page);
void rram_source_linked(struct rram_session *s);
void rram_source_unlinked(struct rram_session *s);
void rram_source_drop(struct rram_session *s);
bool rram_source_message(struct rram_session *s, struct rram_buf *b);
bool rram_source_step(struct rram_session *s);
int rram_source_precopy(struct rram_session *s, struct rram_precopy_args *a);
int rram_source_switch(struct rram_session *s, struct rram_switch_args *a);
void rram_source_stats(struct rram_session *s, struct rram_stats *st);

/* import.c */
int rram_dest_new(struct rram_session *s);
void rram_dest_free(struct rram_session *s);
void rram_dest_linked(struct rram_session *s);
void rram_dest_drop(struct rram_session *s);
void rram_dest_sweep(struct rram_session *s, enum rram_link_kind kind,
		     struct ib_qp *qp);
void rram_dest_end(struct rram_session *s, bool lost);
bool rram_dest_message(struct rram_session *s, struct rram_buf *b);
bool rram_dest_lingers(struct rram_session *s);
bool rram_dest_stuck(struct rram_session *s);
bool rram_dest_step(struct rram_session *s);
int rram_demand(struct rram_session *s, unsigned long index,
		struct rram_place *place);
bool rram_demand_ahead(struct rram_session *s, unsigned long index);
void rram_place_leave(struct rram_session *s, struct rram_place *p);
bool rram_no_room(int err);
void rram_dest_fault(struct rram_session *s, unsigned long index);
void rram_dest_stats(struct rram_session *s, struct rram_stats *st);

/* ioctl.c */
long rram_ioctl(struct file *file, unsigned int cmd, unsigned long arg);

/* debug.c */
void rram_debug_init(void);
void rram_debug_exit(void);
void rram_debug_add(struct rram_session *s);
void rram_debug_remove(struct rram_session *s);
void rram_count_hist(atomic64_t *hist, u64 ns);
void rram_stats(struct rram_session *s, struct rram_stats *st);

#endif /* _RRAM_H */
