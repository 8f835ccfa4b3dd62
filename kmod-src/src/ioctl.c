// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The control surface: checks what user space says and passes it on. What the
 * calls mean is in include/uapi/linux/remote_ram.h.
 *
 * Sockets, threads and debugfs are waited for under rram_file.control. Some
 * of them touch user memory with locks of theirs held, so what mmap() takes with
 * the memory map's lock held is another lock: rram_file.lock, under which nothing
 * of that is done.
 */
#include <linux/inet.h>
#include <linux/pagemap.h>
#include <linux/shmem_fs.h>
#include <linux/uaccess.h>
#include <rdma/ib_addr.h>

#include "remote_ram.h"

/*
 * Copies a structure from user space that starts with its own size. A shorter
 * one is filled up with zeroes, a longer one must be zero beyond what is known
 * here.
 */
static int rram_copy_in(void *to, const void __user *from, size_t known)
{
	u32 size;

	if (get_user(size, (const u32 __user *)from))
		return -EFAULT;
	if (size < sizeof(size))
		return -EINVAL;
	if (size > PAGE_SIZE)
		return -E2BIG;
	return copy_struct_from_user(to, known, from, size);
}

static int rram_copy_out(void __user *to, const void *from, size_t known)
{
	u32 size;

	/* As the caller knows it: it may have changed it meanwhile. */
	if (get_user(size, (const u32 __user *)to))
		return -EFAULT;
	return copy_to_user(to, from, min_t(size_t, size, known)) ? -EFAULT : 0;
}

static int rram_check_args(struct rram_session_args *a, bool listens)
{
	struct sockaddr_storage *ss = (struct sockaddr_storage *)a->addr;

	BUILD_BUG_ON(sizeof(struct sockaddr_storage) > RRAM_ADDR_LEN);
	BUILD_BUG_ON(offsetof(struct rram_session_args, addr) % 8);
	if (a->flags || a->reserved || a->reason)
		return -EINVAL;
	switch (ss->ss_family) {
	case AF_INET:
		if (!listens && !((struct sockaddr_in *)ss)->sin_port)
			return -EINVAL;
		break;
	case AF_INET6:
		if (!listens && !((struct sockaddr_in6 *)ss)->sin6_port)
			return -EINVAL;
		break;
	default:
		return -EINVAL;
	}
	if (!a->connect_ms)
		a->connect_ms = 10 * MSEC_PER_SEC;
	if (!a->reconnect_ms)
		a->reconnect_ms = 3600 * MSEC_PER_SEC;
	if (!a->heartbeat_ms)
		a->heartbeat_ms = MSEC_PER_SEC;
	if (!a->dead_ms)
		a->dead_ms = 5 * MSEC_PER_SEC;
	/* A heartbeat that is slower than patience would cut every line. */
	if (a->dead_ms < 2 * (u64)a->heartbeat_ms)
		return -EINVAL;
	/* Waits for it are a little longer. */
	if (a->connect_ms > 3600 * MSEC_PER_SEC)
		return -EINVAL;
	return 0;
}

/* Whether a file may begin a session. The caller holds f->control. */
static int rram_may_begin(struct rram_file *f)
{
	if (rcu_access_pointer(f->session))
		return -EBUSY;
	if (!f->npages || f->npages > U32_MAX)
		return -EINVAL;
	return rram_file_bitmaps(f);
}

static int rram_reason_error(enum rram_reason reason)
{
	switch (reason) {
	case RRAM_REASON_VERSION:
	case RRAM_REASON_TOKEN:
	case RRAM_REASON_UUID:
	case RRAM_REASON_SIZE:
	case RRAM_REASON_BUSY:
	case RRAM_REASON_STATE:
	case RRAM_REASON_PROTOCOL:
		return -ECONNREFUSED;
	case RRAM_REASON_UNREACHABLE:
		return -EHOSTUNREACH;
	case RRAM_REASON_TIMEOUT:
		return -ETIMEDOUT;
	case RRAM_REASON_NO_MEMORY:
		return -ENOMEM;
	case RRAM_REASON_DEVICE:
		return -ENODEV;
	default:
		return -ECONNRESET;
	}
}

static long rram_export(struct rram_file *f, void __user *arg)
{
	struct rram_session_args a;
	struct rram_session *s;
	enum rram_state state;
	enum rram_reason reason;
	int err;

	err = rram_copy_in(&a, arg, sizeof(a));
	err = err ?: rram_check_args(&a, false);
	if (err)
		return err;
	mutex_lock(&f->control);
	err = rram_may_begin(f);
	/* What was lost may have been punched out since, to the last page. */
	if (!err && f->phase == RRAM_PHASE_LOST &&
	    !atomic_long_read(&f->nr_missing))
		WRITE_ONCE(f->phase, RRAM_PHASE_PLAIN);
	/* What is missing here can't be given to anybody. */
	if (!err && f->phase != RRAM_PHASE_PLAIN)
		err = -EBUSY;
	if (err)
		goto unlock;
	s = rram_session_new(f, RRAM_ROLE_SOURCE, &a);
	if (IS_ERR(s)) {
		err = PTR_ERR(s);
		goto unlock;
	}
	WRITE_ONCE(f->frozen, false);
	kref_get(&s->ref);
	rram_session_start(s);
	mutex_unlock(&f->control);
	/* The thread gives up by itself; it may need a little longer. */
	err = rram_wait_state(s, BIT(RRAM_STATE_CONNECTED),
			      s->args.connect_ms + 5 * MSEC_PER_SEC);
	state = rram_get_state(s, &reason);
	if (!err && state != RRAM_STATE_CONNECTED)
		err = rram_reason_error(reason);
	if (err) {
		/* Nothing is left behind of a session that never was. */
		mutex_lock(&f->control);
		if (rcu_access_pointer(f->session) == s)
			rram_session_end(f);
		mutex_unlock(&f->control);
	}
	rram_session_put(s);
	a.reason = err ? reason : RRAM_REASON_NONE;
	memzero_explicit(a.token, sizeof(a.token));
	return rram_copy_out(arg, &a, sizeof(a)) ?: err;
unlock:
	mutex_unlock(&f->control);
	memzero_explicit(a.token, sizeof(a.token));
	return err;
}

/*
 * Makes all pages of a file missing. The caller holds f->lock until the session
 * can be found: who maps the file meanwhile, and faults, would have nobody to
 * ask.
 */
static int rram_empty(struct rram_file *f)
{
	struct folio *folio;

	/* Pages that somebody has mapped can't become missing unnoticed. */
	if (f->nr_maps)
		return -EBUSY;
	shmem_truncate_range(rram_inner(f), 0, (loff_t)-1);
	folio = rram_grab(f, 0);
	if (IS_ERR(folio))
		return PTR_ERR(folio);
	folio_unlock(folio);
	folio_put(folio);
	shmem_truncate_range(rram_inner(f), 0, (loff_t)-1);
	bitmap_set(f->missing, 0, f->npages);
	bitmap_zero(f->inflight, f->npages);
	bitmap_zero(f->lost, f->npages);
	bitmap_zero(f->dirty, f->npages);
	memset(f->heat, 0, f->npages);
	atomic_long_set(&f->nr_missing, f->npages);
	atomic_long_set(&f->nr_lost, 0);
	f->frozen = false;
	f->large = false;
	/* The bitmaps before those who look at them. */
	smp_wmb();
	WRITE_ONCE(f->tracking, true);
	WRITE_ONCE(f->phase, RRAM_PHASE_AHEAD);
	return 0;
}

static long rram_attach(struct rram_file *f, void __user *arg)
{
	struct rram_session_args a;
	struct rram_session *s;
	int err;

	err = rram_copy_in(&a, arg, sizeof(a));
	err = err ?: rram_check_args(&a, true);
	if (err)
		return err;
	/* Who holds it may wait for a page, for as long as there is no line. */
	if (down_write_killable(&f->inode.i_rwsem))
		return -EINTR;
	mutex_lock(&f->control);
	err = rram_may_begin(f);
	if (err)
		goto unlock;
	s = rram_session_new(f, RRAM_ROLE_DESTINATION, &a);
	if (IS_ERR(s)) {
		err = PTR_ERR(s);
		goto unlock;
	}
	err = rram_listen(s);
	if (!err) {
		memcpy(a.addr, s->args.addr, sizeof(a.addr));
		mutex_lock(&f->lock);
		err = rram_empty(f);
		if (!err)
			rram_session_start(s);
		mutex_unlock(&f->lock);
	}
	if (err)
		rram_session_cancel(s);
unlock:
	mutex_unlock(&f->control);
	inode_unlock(&f->inode);
	memzero_explicit(a.token, sizeof(a.token));
	return err ?: rram_copy_out(arg, &a, sizeof(a));
}

static long rram_precopy(struct rram_session *s, void __user *arg)
{
	struct rram_precopy_args a;
	int err = rram_copy_in(&a, arg, sizeof(a));

	if (err)
		return err;
	if (a.flags || a.reserved || s->role != RRAM_ROLE_SOURCE)
		return -EINVAL;
	return rram_source_precopy(s, &a);
}

static long rram_switch(struct rram_session *s, void __user *arg)
{
	struct rram_switch_args a;
	int err = rram_copy_in(&a, arg, sizeof(a));

	if (err)
		return err;
	if (a.flags || s->role != RRAM_ROLE_SOURCE)
		return -EINVAL;
	err = rram_source_switch(s, &a);
	return rram_copy_out(arg, &a, sizeof(a)) ?: err;
}

static long rram_wait(struct rram_session *s, void __user *arg)
{
	struct rram_wait_args a;
	enum rram_reason reason;
	int err = rram_copy_in(&a, arg, sizeof(a));

	if (err)
		return err;
	if (a.reserved || a.states >= BIT(RRAM_STATE_LOST + 1))
		return -EINVAL;
	if (s)
		err = rram_wait_state(s, a.states, a.timeout_ms);
	a.state = s ? rram_get_state(s, &reason) : RRAM_STATE_NONE;
	a.reason = s ? reason : RRAM_REASON_NONE;
	return rram_copy_out(arg, &a, sizeof(a)) ?: err;
}

static long rram_tune(struct rram_session *s, void __user *arg)
{
	struct rram_tune_args a;
	int err = rram_copy_in(&a, arg, sizeof(a));

	if (err)
		return err;
	switch (a.what) {
	case RRAM_TUNE_BANDWIDTH:
		WRITE_ONCE(s->args.bandwidth, a.value);
		break;
	case RRAM_TUNE_BUSY_POLL_US:
		if (a.value > USEC_PER_SEC)
			return -EINVAL;
		WRITE_ONCE(s->busy_poll_us, a.value);
		break;
	case RRAM_TUNE_BATCH_PAGES:
		if (!a.value || a.value > RRAM_BATCH_MAX)
			return -EINVAL;
		WRITE_ONCE(s->batch, a.value);
		break;
	case RRAM_TUNE_BACKGROUND:
		if (a.value > 1)
			return -EINVAL;
		WRITE_ONCE(s->background, a.value);
		break;
	default:
		return -EINVAL;
	}
	rram_poke(s);
	return 0;
}

static long rram_get_stats(struct rram_file *f, struct rram_session *s,
			   void __user *arg)
{
	struct rram_stats *st;
	u32 size;
	long err;

	if (get_user(size, (const u32 __user *)arg))
		return -EFAULT;
	if (size < sizeof(size))
		return -EINVAL;
	st = kzalloc(sizeof(*st), GFP_KERNEL);
	if (!st)
		return -ENOMEM;
	if (s)
		rram_stats(s, st);
	st->size = sizeof(*st);
	st->abi = RRAM_ABI_VERSION;
	st->pages = f->npages;
	if (f->phase != RRAM_PHASE_PLAIN)
		st->pages_missing = rram_lacking(f);
	/* Of the file, with or without the session that lost them. */
	if (f->phase == RRAM_PHASE_LOST)
		st->pages_lost = atomic_long_read(&f->nr_missing);
	err = copy_to_user(arg, st, min_t(size_t, size, sizeof(*st))) ?
	      -EFAULT : 0;
	kfree(st);
	return err;
}

static bool rram_abort_decided(struct rram_session *s)
{
	return rram_ended(rram_get_state(s, NULL)) || !READ_ONCE(s->aborted);
}

static long rram_abort(struct rram_session *s)
{
	long left;

	/* Pages that only this side has are not its to withhold. */
	if (s->role == RRAM_ROLE_SOURCE &&
	    rram_switched(rram_get_state(s, NULL)))
		return -EBUSY;
	WRITE_ONCE(s->aborted, true);
	rram_poke(s);
	/* A switch that succeeds at this moment is what counts. */
	left = wait_event_interruptible_timeout(s->changed,
						rram_abort_decided(s), 30 * HZ);
	if (left < 0)
		return -EINTR;
	if (!left)
		return -ETIMEDOUT;
	return rram_ended(rram_get_state(s, NULL)) ? 0 : -EBUSY;
}

static long rram_take_back(struct rram_session *s)
{
	enum rram_state state = rram_get_state(s, NULL);
	int err;

	if (s->role != RRAM_ROLE_SOURCE)
		return -EINVAL;
	if (rram_ended(state))
		return state == RRAM_STATE_COMPLETE ? -EBUSY : 0;
	WRITE_ONCE(s->taken_back, true);
	WRITE_ONCE(s->aborted, true);
	rram_poke(s);
	err = rram_wait_state(s, 0, 30 * MSEC_PER_SEC);
	if (err)
		return err;
	/* The last page may have left meanwhile. */
	return rram_get_state(s, NULL) == RRAM_STATE_COMPLETE ? -EBUSY : 0;
}

static long rram_release(struct rram_file *f)
{
	struct rram_session *s;
	int err = 0;

	mutex_lock(&f->control);
	s = rcu_dereference_protected(f->session, lockdep_is_held(&f->control));
	if (s && !rram_ended(rram_get_state(s, NULL))) {
		err = -EBUSY;
	} else if (s) {
		rram_session_end(f);
		WRITE_ONCE(f->frozen, false);
	}
	mutex_unlock(&f->control);
	return err;
}

static long rram_collapse(struct rram_file *f, void __user *arg)
{
	struct rram_process_args a;
	int err = rram_copy_in(&a, arg, sizeof(a));

	return err ?: rram_allow_collapse(f, a.pid);
}

long rram_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	struct rram_file *f = rram_file_of(file_inode(file));
	void __user *user = (void __user *)arg;
	struct rram_session *s;
	long err;

	if (_IOC_TYPE(cmd) != RRAM_IOC_MAGIC)
		return -ENOTTY;
	/* Whoever may only read may also look. */
	if (!(file->f_mode & FMODE_WRITE) && cmd != RRAM_IOC_STATS &&
	    cmd != RRAM_IOC_WAIT)
		return -EBADF;
	switch (cmd) {
	case RRAM_IOC_EXPORT:
		return rram_export(f, user);
	case RRAM_IOC_ATTACH:
		return rram_attach(f, user);
	case RRAM_IOC_RELEASE:
		return rram_release(f);
	case RRAM_IOC_ALLOW_COLLAPSE:
		return rram_collapse(f, user);
	}
	s = rram_session_get(f);
	switch (cmd) {
	case RRAM_IOC_STATS:
		err = rram_get_stats(f, s, user);
		break;
	case RRAM_IOC_WAIT:
		err = rram_wait(s, user);
		break;
	case RRAM_IOC_PRECOPY:
		err = s ? rram_precopy(s, user) : -ENOTCONN;
		break;
	case RRAM_IOC_SWITCH:
		err = s ? rram_switch(s, user) : -ENOTCONN;
		break;
	case RRAM_IOC_TUNE:
		err = s ? rram_tune(s, user) : -ENOTCONN;
		break;
	case RRAM_IOC_ABORT:
		err = s ? rram_abort(s) : -ENOTCONN;
		break;
	case RRAM_IOC_TAKE_BACK:
		err = s ? rram_take_back(s) : -ENOTCONN;
		break;
	default:
		err = -ENOTTY;
	}
	if (s)
		rram_session_put(s);
	return err;
}
