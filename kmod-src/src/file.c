// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A file of guest RAM: mapping, faults, reading and writing.
 *
 * The file owns one shmem file, to which every mapping is redirected. So
 * swap, memory cgroups, NUMA policy and hole punching are shmem's; what is
 * ours is the question that comes before: is the page here? While it is not,
 * shmem must not be asked, since it would hand out zeroes.
 */
#include <linux/falloc.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/shmem_fs.h>
#include <linux/uio.h>

#include "remote_ram.h"
#include "trace.h"

/* shmem's own operations, known from its first mapping, and ours over them. */
static DEFINE_MUTEX(rram_vm_ops_lock);
static const struct vm_operations_struct *rram_shmem_vm_ops;
static struct vm_operations_struct rram_vm_ops;
static const struct file_operations *rram_shmem_fops;
static struct file_operations rram_inner_fops;

/* Held by who came through the inner file, which does not keep ours. */
DEFINE_STATIC_SRCU(rram_inner_srcu);

static struct file *rram_vma_file(struct vm_area_struct *vma)
{
	return vma->vm_private_data;
}

static struct rram_file *rram_of_vma(struct vm_area_struct *vma)
{
	return rram_file_of(file_inode(rram_vma_file(vma)));
}

static bool rram_missing(struct rram_file *f, unsigned long index)
{
	/* Pairs with the order in which a completed READ clears the bit. */
	return test_bit_acquire(index, f->missing);
}

static wait_queue_head_t *rram_waitq(struct rram_file *f, unsigned long index)
{
	return &f->wait[index % RRAM_WAITS];
}

/* Somebody who waits for a page, in a queue that other pages share. */
struct rram_waiter {
	struct wait_queue_entry entry;
	struct rram_place place;
};

static int rram_wake_waiter(struct wait_queue_entry *entry, unsigned int mode,
			    int sync, void *key)
{
	struct rram_waiter *w = container_of(entry, struct rram_waiter, entry);
	const struct rram_run *run = key;

	/* Without a key there is news for all. */
	if (run && w->place.index - run->first >= run->nr)
		return 0;
	return woken_wake_function(entry, mode, sync, key);
}

void rram_wake_page(struct rram_file *f, unsigned long index)
{
	struct rram_run run = { .first = index, .nr = 1 };

	/* The bit that the sleeper looks at was changed before this. */
	if (wq_has_sleeper(rram_waitq(f, index)))
		__wake_up(rram_waitq(f, index), TASK_NORMAL, 0, &run);
}

/* There is news of a chunk's key. */
void rram_wake_chunk(struct rram_file *f, unsigned long chunk)
{
	struct rram_run run = {
		.first = chunk << RRAM_CHUNK_SHIFT,
		.nr = RRAM_CHUNK_PAGES,
	};
	unsigned int i;

	for (i = 0; i < RRAM_WAITS; i++)
		if (wq_has_sleeper(&f->wait[i]))
			__wake_up(&f->wait[i], TASK_NORMAL, 0, &run);
}

void rram_wake_pages(struct rram_file *f)
{
	unsigned int i;

	for (i = 0; i < RRAM_WAITS; i++)
		wake_up_all(&f->wait[i]);
}

/* How long one waits in a kernel thread on behalf of somebody else. */
#define RRAM_BEHALF	HZ

/* How somebody waits for a page. */
enum rram_patience {
	RRAM_WAIT_KILLABLE,
	RRAM_WAIT_INTERRUPTIBLE,
};

/*
 * Whether we are a kernel thread that faults for somebody else, as KVM's
 * asynchronous page faults do in a workqueue. Nobody can kill it, while a
 * process that ends waits for it.
 */
static bool rram_on_behalf(void)
{
	return current->flags & PF_KTHREAD && !current->mm;
}

/*
 * Waits until a page is here, and sees to it that it comes. Returns 0,
 * -EINTR, -EHWPOISON (it will not come), -EIO (the session failed before the
 * switch), or why there is no room for it.
 */
static int rram_await(struct rram_file *f, unsigned long index,
		      enum rram_patience patience)
{
	struct rram_waiter w = { .place.index = index };
	int mode = patience == RRAM_WAIT_KILLABLE ? TASK_KILLABLE :
						    TASK_INTERRUPTIBLE;
	struct rram_session *s = rram_session_get(f);
	ktime_t begun = ktime_get();
	long left = rram_on_behalf() ? RRAM_BEHALF : MAX_SCHEDULE_TIMEOUT;
	bool told = false;
	u64 ns;
	int err;

	INIT_LIST_HEAD(&w.place.list);
	init_waitqueue_func_entry(&w.entry, rram_wake_waiter);
	w.entry.private = current;
	add_wait_queue(rram_waitq(f, index), &w.entry);
	smp_mb();	/* before looking; pairs with rram_wake_page() */
	for (;;) {
		switch (READ_ONCE(f->phase)) {
		case RRAM_PHASE_LOST:
			err = rram_missing(f, index) ? -EHWPOISON : 0;
			goto out;
		case RRAM_PHASE_FAILED:
			err = rram_missing(f, index) ? -EIO : 0;
			goto out;
		case RRAM_PHASE_PLAIN:
			err = 0;
			goto out;
		default:
			break;
		}
		if (test_bit(index, f->lost)) {
			err = -EHWPOISON;
			goto out;
		}
		if (!s) {
			/* Ended between two looks. */
			err = rram_missing(f, index) ? -EIO : 0;
			goto out;
		}
		err = rram_demand(s, index, &w.place);
		if (!err || rram_no_room(err))
			goto out;
		if (!told) {
			told = true;
			if (err == -EINPROGRESS)
				atomic64_inc(&s->count.faults_joined);
			rram_dest_fault(s, index);
		}
		if (s->busy_poll_us) {
			ktime_t end = ktime_add_us(begun, s->busy_poll_us);

			while (rram_missing(f, index) &&
			       !signal_pending(current) &&
			       ktime_before(ktime_get(), end)) {
				cpu_relax();
				/* Its page may come by a thread of this CPU. */
				cond_resched();
			}
			if (!rram_missing(f, index))
				continue;
		}
		if (patience == RRAM_WAIT_KILLABLE ?
		    fatal_signal_pending(current) : signal_pending(current)) {
			err = -EINTR;
			goto out;
		}
		/*
		 * Woken when the page comes, a key comes, a READ is free, or the
		 * state changes.
		 */
		left = wait_woken(&w.entry, mode, left);
		if (!left) {
			err = -EINTR;
			goto out;
		}
	}
out:
	remove_wait_queue(rram_waitq(f, index), &w.entry);
	if (s) {
		rram_place_leave(s, &w.place);
		if (told) {
			ns = ktime_to_ns(ktime_sub(ktime_get(), begun));
			atomic64_add(ns, &s->count.wait_ns_total);
			if (ns > atomic64_read(&s->count.wait_ns_max))
				atomic64_set(&s->count.wait_ns_max, ns);
			rram_count_hist(s->count.wait_hist, ns);
		}
		rram_session_put(s);
	}
	return err;
}

int rram_fill(struct rram_file *f, unsigned long first, unsigned long last)
{
	unsigned long i;
	int err;

	if (READ_ONCE(f->phase) == RRAM_PHASE_PLAIN)
		return 0;
	for (i = first; i <= last && i < f->npages; i++) {
		if (!rram_missing(f, i))
			continue;
		err = rram_await(f, i, RRAM_WAIT_KILLABLE);
		if (err)
			return err == -EHWPOISON ? -EIO : err;
		cond_resched();
	}
	return 0;
}

/* A fault on a page that is not here. */
static vm_fault_t rram_fault_missing(struct vm_fault *vmf, struct rram_file *f)
{
	unsigned long index = vmf->pgoff;
	unsigned int flags = vmf->flags;
	struct rram_session *s;
	struct file *file;
	int err;

	s = rram_session_get(f);
	trace_rram_fault(f, index, flags);
	if (flags & FAULT_FLAG_ALLOW_RETRY && flags & FAULT_FLAG_RETRY_NOWAIT) {
		/*
		 * Who can't wait comes back as somebody who can: KVM queues
		 * its asynchronous fault at once, and finds the page on its
		 * way. The lock stays held.
		 */
		if (s) {
			atomic64_inc(&s->count.faults_nowait);
			if (rram_demand_ahead(s, index))
				atomic64_inc(&s->count.faults_begun);
			rram_session_put(s);
		}
		return VM_FAULT_RETRY;
	}
	if (flags & FAULT_FLAG_ALLOW_RETRY && flags & FAULT_FLAG_TRIED) {
		/*
		 * The last try may have ended without the page. If that is
		 * for good it has to be said with the lock held, or this would
		 * go on for ever. KVM faults again, in the guest's name.
		 */
		err = s && !rram_on_behalf() ? rram_demand(s, index, NULL) : 0;
		if (rram_no_room(err) || rram_on_behalf()) {
			if (s)
				rram_session_put(s);
			return rram_no_room(err) ? vmf_error(err) :
						   VM_FAULT_SIGBUS;
		}
	}
	if (flags & FAULT_FLAG_ALLOW_RETRY) {
		/*
		 * Wait without the lock. Once it is released neither vmf nor
		 * the VMA may be touched: the file is what keeps all of this
		 * alive.
		 */
		file = get_file(rram_vma_file(vmf->vma));
		if (s) {
			atomic64_inc(&s->count.faults_retry);
			rram_session_put(s);
		}
		release_fault_lock(vmf);
		err = rram_await(f, index,
				 flags & FAULT_FLAG_INTERRUPTIBLE &&
				 !(flags & FAULT_FLAG_TRIED) ?
				 RRAM_WAIT_INTERRUPTIBLE : RRAM_WAIT_KILLABLE);
		trace_rram_fault_done(f, index, err);
		/* Whatever came of it: the next try finds out with the lock. */
		fput(file);
		return VM_FAULT_RETRY;
	}
	if (s) {
		atomic64_inc(&s->count.faults_plain);
		rram_session_put(s);
	}
	err = rram_await(f, index, RRAM_WAIT_KILLABLE);
	trace_rram_fault_done(f, index, err);
	/* A lost page is handled where it is seen to be lost, with the lock. */
	if (err == -EINTR)
		return VM_FAULT_SIGBUS;
	return rram_no_room(err) ? vmf_error(err) : 0;
}

/* The answer to a fault on a page that will never be here; 0 if it may. */
static vm_fault_t rram_fault_lost(struct rram_file *f, unsigned long index)
{
	enum rram_phase phase = READ_ONCE(f->phase);
	struct rram_session *s;

	if (test_bit(index, f->lost))
		phase = RRAM_PHASE_LOST;
	switch (phase) {
	case RRAM_PHASE_LOST:
		s = rram_session_get(f);
		if (s) {
			atomic64_inc(&s->count.faults_poison);
			rram_session_put(s);
		}
		/*
		 * For the guest: a machine check for this page alone. SIGBUS
		 * would make KVM try again for ever.
		 */
		return VM_FAULT_HWPOISON;
	case RRAM_PHASE_FAILED:
		/* The VM does not run here and never will. */
		return VM_FAULT_SIGBUS;
	default:
		return 0;
	}
}

static vm_fault_t rram_fault(struct vm_fault *vmf)
{
	struct rram_file *f = rram_of_vma(vmf->vma);
	enum rram_phase phase = READ_ONCE(f->phase);
	struct file *file;
	vm_fault_t ret;

	if (likely(phase == RRAM_PHASE_PLAIN))
		return rram_shmem_vm_ops->fault(vmf);
	if (vmf->pgoff >= f->npages)
		return VM_FAULT_SIGBUS;
again:
	if (phase == RRAM_PHASE_AHEAD) {
		/*
		 * A page that is here may become missing. Not between this
		 * look and the moment the folio is locked; and whoever makes
		 * it missing locks the folio before unmapping it, so waits
		 * until this fault has mapped it.
		 */
		if (!down_read_trylock(&f->stale)) {
			if (vmf->flags & FAULT_FLAG_RETRY_NOWAIT)
				return VM_FAULT_RETRY;
			down_read(&f->stale);
		}
	}
	if (!rram_missing(f, vmf->pgoff)) {
		if (phase != RRAM_PHASE_AHEAD)
			return rram_shmem_vm_ops->fault(vmf);
		/* shmem may let go of the VMA, and with it of our file. */
		file = get_file(rram_vma_file(vmf->vma));
		ret = rram_shmem_vm_ops->fault(vmf);
		up_read(&f->stale);
		fput(file);
		return ret;
	}
	if (phase == RRAM_PHASE_AHEAD)
		up_read(&f->stale);
	ret = rram_fault_lost(f, vmf->pgoff);
	if (ret)
		return ret;
	ret = rram_fault_missing(vmf, f);
	if (ret)
		return ret;
	phase = READ_ONCE(f->phase);
	goto again;
}

/* Maps pages around a fault: only up to the next one that is missing. */
static vm_fault_t rram_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end)
{
	struct rram_file *f = rram_of_vma(vmf->vma);
	enum rram_phase phase = READ_ONCE(f->phase);
	pgoff_t index = vmf->pgoff;
	vm_fault_t ret = 0;

	if (likely(phase == RRAM_PHASE_PLAIN))
		return rram_shmem_vm_ops->map_pages(vmf, start, end);
	if (index >= f->npages)
		return 0;
	/* Called under RCU: no sleeping. */
	if (phase == RRAM_PHASE_AHEAD && !down_read_trylock(&f->stale))
		return 0;
	if (!rram_missing(f, index)) {
		pgoff_t next;

		next = find_next_bit(f->missing, min(end + 1, f->npages), index);
		end = next - 1;
		while (start < index) {
			next = find_next_bit(f->missing, index, start);
			if (next >= index)
				break;
			start = next + 1;
		}
		smp_rmb();	/* as test_bit_acquire() for those in between */
		ret = rram_shmem_vm_ops->map_pages(vmf, start, end);
	}
	if (phase == RRAM_PHASE_AHEAD)
		up_read(&f->stale);
	return ret;
}

static vm_fault_t rram_page_mkwrite(struct vm_fault *vmf)
{
	struct rram_file *f = rram_of_vma(vmf->vma);
	struct folio *folio = page_folio(vmf->page);

	folio_lock(folio);
	if (folio->mapping != f->shmem->f_mapping)
		goto again;
	/* It may have become stale since rram_fault() let go of it. */
	if (READ_ONCE(f->phase) != RRAM_PHASE_PLAIN &&
	    rram_missing(f, vmf->pgoff))
		goto again;
	/*
	 * Under the folio's lock, which is kept until the page is writable: a
	 * harvest takes the bit, then this lock, and with it takes write access
	 * away.
	 */
	if (folio_test_large(folio)) {
		/* It may be mapped as a whole by this one fault. */
		WRITE_ONCE(f->large, true);
		if (READ_ONCE(f->tracking))
			rram_track_write(f, folio->index,
					 folio_nr_pages(folio));
	} else if (READ_ONCE(f->tracking)) {
		rram_track_write(f, vmf->pgoff, 1);
	}
	return VM_FAULT_LOCKED;
again:
	folio_unlock(folio);
	return VM_FAULT_NOPAGE;
}

/*
 * vma->vm_file is the shmem file, so this is what keeps our file, with it the
 * mount, and with that the module, while there is a mapping.
 */
static void rram_vma_open(struct vm_area_struct *vma)
{
	struct rram_file *f = rram_of_vma(vma);

	get_file(rram_vma_file(vma));
	mutex_lock(&f->lock);
	f->nr_maps++;
	mutex_unlock(&f->lock);
}

static void rram_vma_close(struct vm_area_struct *vma)
{
	struct rram_file *f = rram_of_vma(vma);

	mutex_lock(&f->lock);
	f->nr_maps--;
	mutex_unlock(&f->lock);
	fput(rram_vma_file(vma));
}

static int rram_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct rram_file *f = rram_file_of(file_inode(file));
	int err;

	/* A private copy would be made of pages that are not here. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	mutex_lock(&f->lock);
	vma_set_file(vma, f->shmem);
	err = rram_mmap_inner(f->shmem, vma);
	if (err)
		goto unlock;
	mutex_lock(&rram_vm_ops_lock);
	if (!rram_shmem_vm_ops) {
		rram_vm_ops = *vma->vm_ops;
		rram_vm_ops.fault = rram_fault;
		rram_vm_ops.map_pages = rram_map_pages;
		rram_vm_ops.page_mkwrite = rram_page_mkwrite;
		rram_vm_ops.open = rram_vma_open;
		rram_vm_ops.close = rram_vma_close;
		RRAM_CLEAR_UFFD_OPS(rram_vm_ops);
		rram_shmem_vm_ops = vma->vm_ops;
	}
	mutex_unlock(&rram_vm_ops_lock);
	vma->vm_ops = &rram_vm_ops;
	vma->vm_private_data = get_file(file);
	/*
	 * While pages are missing nobody may collapse what is here into a huge
	 * page: this flag rules it out for mappings that are made now, and
	 * RRAM_IOC_ATTACH refuses a file with older ones. It stays when all are
	 * here, until rram_allow_collapse().
	 */
	if (f->phase != RRAM_PHASE_PLAIN)
		rram_vm_flags_set(vma, VM_DONTEXPAND);
	f->nr_maps++;
unlock:
	mutex_unlock(&f->lock);
	return err;
}

/**
 * rram_allow_collapse - lets what a process has mapped be made of huge pages
 * @f: the file
 * @nr: number of the process, in the namespace of who asks
 *
 * Return: 0, -EBUSY while pages are missing, -ESRCH without such a process,
 * -ENOENT if it maps nothing of the file, -EINTR.
 */
int rram_allow_collapse(struct rram_file *f, pid_t nr)
{
	struct vm_area_struct *vma;
	struct task_struct *task;
	struct mm_struct *mm;
	struct pid *pid;
	int err = -EINTR;

	/* Who waits for a page may hold what is asked for below. */
	if (READ_ONCE(f->phase) != RRAM_PHASE_PLAIN)
		return -EBUSY;
	pid = find_get_pid(nr);
	task = get_pid_task(pid, PIDTYPE_PID);
	put_pid(pid);
	if (!task)
		return -ESRCH;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return -ESRCH;
	if (mmap_write_lock_killable(mm))
		goto put;
	err = -ENOENT;
	for (vma = find_vma(mm, 0); vma; vma = find_vma(mm, vma->vm_end)) {
		if (vma->vm_ops != &rram_vm_ops || rram_of_vma(vma) != f)
			continue;
		/* No page is going to be missing in a file that is mapped. */
		if (READ_ONCE(f->phase) != RRAM_PHASE_PLAIN) {
			err = -EBUSY;
			break;
		}
		rram_vm_flags_clear(vma, VM_DONTEXPAND);
		err = 0;
	}
	mmap_write_unlock(mm);
put:
	mmput(mm);
	return err;
}

static ssize_t rram_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	struct rram_file *f = rram_file_of(inode);
	size_t want = iov_iter_count(to), left;
	ssize_t done = 0, ret = 0;
	loff_t size;
	int err;

	/* In pieces: not all of a large read has to be here at once. */
	while (want) {
		size = i_size_read(inode);
		if (iocb->ki_pos >= size)
			break;
		left = min_t(size_t, want, SZ_256K);
		left = min_t(loff_t, left, size - iocb->ki_pos);
		err = rram_fill(f, iocb->ki_pos >> PAGE_SHIFT,
				(iocb->ki_pos + left - 1) >> PAGE_SHIFT);
		if (err)
			return done ? done : err;
		iov_iter_truncate(to, left);
		ret = vfs_iter_read(f->shmem, to, &iocb->ki_pos, 0);
		if (ret <= 0)
			break;
		done += ret;
		want -= ret;
		iov_iter_reexpand(to, want);
		if (ret < left)
			break;
	}
	return done ? done : ret;
}

static ssize_t rram_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	struct rram_file *f = rram_file_of(inode);
	loff_t pos;
	ssize_t ret;

	/* Who holds it may wait for a page, for as long as there is no line. */
	if (down_write_killable(&inode->i_rwsem))
		return -EINTR;
	ret = generic_write_checks(iocb, from);
	if (ret <= 0)
		goto unlock;
	/* RAM does not grow by being written to. */
	if (iocb->ki_pos >= i_size_read(inode)) {
		ret = -ENOSPC;
		goto unlock;
	}
	if (READ_ONCE(f->frozen)) {
		ret = -EBUSY;
		goto unlock;
	}
	iov_iter_truncate(from, i_size_read(inode) - iocb->ki_pos);
	pos = iocb->ki_pos;
	ret = rram_fill(f, pos >> PAGE_SHIFT,
			(pos + iov_iter_count(from) - 1) >> PAGE_SHIFT);
	if (ret)
		goto unlock;
	ret = vfs_iter_write(f->shmem, from, &iocb->ki_pos, 0);
	/* After the fact: a harvest that misses the bit has missed the data. */
	if (ret > 0 && READ_ONCE(f->tracking))
		rram_track_write(f, pos >> PAGE_SHIFT,
				 ((pos + ret - 1) >> PAGE_SHIFT) -
				 (pos >> PAGE_SHIFT) + 1);
unlock:
	inode_unlock(inode);
	return ret;
}

/* Takes a page, also one that is kept taken because it is lost. */
static bool rram_take_any(struct rram_file *f, unsigned long index)
{
	if (!test_and_set_bit_lock(index, f->inflight))
		return true;
	if (!test_and_clear_bit(index, f->lost))
		return false;
	atomic_long_dec(&f->nr_lost);
	return true;
}

/*
 * Punches pages out that may be missing. They are taken first, so that no READ
 * brings them, and those that are on their way are waited for. What was missing
 * is no longer missing, since it has new contents: none; that is said when the
 * old ones are gone.
 */
static void rram_punch_taken(struct rram_file *f, unsigned long first,
			     unsigned long last)
{
	unsigned long i;

	/* In ascending order, as rram_take_zero() does. */
	for (i = first; i <= last; i++)
		wait_event(*rram_waitq(f, i), rram_take_any(f, i));
	/*
	 * Without shmem's lock, whose holders may fault while f->stale is held
	 * here: our inode's lock keeps them away.
	 */
	shmem_truncate_range(rram_inner(f), (loff_t)first << PAGE_SHIFT,
			     ((loff_t)(last + 1) << PAGE_SHIFT) - 1);
	for (i = first; i <= last; i++) {
		if (test_and_clear_bit(i, f->missing))
			atomic_long_dec(&f->nr_missing);
		clear_bit_unlock(i, f->inflight);
		rram_wake_page(f, i);
	}
}

/* Punches whole pages while some may be missing, a chunk at a time. */
static long rram_punch_pages(struct rram_file *f, enum rram_phase phase,
			     unsigned long first, unsigned long end)
{
	unsigned long next;
	bool ahead;
	long err = 0;

	for (; first < end && !err; first = next) {
		next = min(end, round_down(first, RRAM_CHUNK_PAGES) +
				RRAM_CHUNK_PAGES);
		/* The switch comes before or after, and sees the bits. */
		ahead = READ_ONCE(f->phase) == RRAM_PHASE_AHEAD;
		if (ahead)
			down_read(&f->stale);
		/* What was to be punched before the switch is not the VM's. */
		if (phase == RRAM_PHASE_AHEAD && READ_ONCE(f->phase) != phase)
			err = -EBUSY;
		else
			rram_punch_taken(f, first, next - 1);
		if (!err && READ_ONCE(f->tracking))
			rram_track_write(f, first, next - first);
		if (ahead)
			up_read(&f->stale);
		cond_resched();
	}
	return err;
}

/* Hole punching, by whichever way it comes. */
static long rram_punch(struct rram_file *f, struct file *via, int mode,
		       loff_t offset, loff_t len)
{
	unsigned long first = offset >> PAGE_SHIFT;
	unsigned long last = (offset + len - 1) >> PAGE_SHIFT;
	unsigned long whole = DIV_ROUND_UP(offset, PAGE_SIZE);
	unsigned long end = min_t(unsigned long, (offset + len) >> PAGE_SHIFT,
				  f->npages);
	enum rram_phase phase = READ_ONCE(f->phase);
	loff_t head = (loff_t)whole << PAGE_SHIFT, tail = offset + len;
	struct rram_session *s;
	long err = 0;

	if (READ_ONCE(f->frozen))
		return -EBUSY;
	if (phase != RRAM_PHASE_PLAIN) {
		/* Parts of a page at either end keep the rest of it. */
		if (!PAGE_ALIGNED(offset)) {
			err = rram_fill(f, first, first);
			if (err)
				return err;
		}
		if (!PAGE_ALIGNED(offset + len)) {
			err = rram_fill(f, last, last);
			if (err)
				return err;
		}
		if (whole < end) {
			err = rram_punch_pages(f, phase, whole, end);
			if (err)
				return err;
		}
		s = rram_session_get(f);
		if (s) {
			rram_poke(s);	/* it may have been the last page */
			rram_session_put(s);
		}
		/* What came since into whole pages is not to be lost. */
		if (phase == RRAM_PHASE_AHEAD && READ_ONCE(f->phase) != phase)
			return -EBUSY;
		if (offset < head)
			err = rram_shmem_fops->fallocate(via, mode, offset,
							 min(head, tail) - offset);
		tail = round_down(tail, PAGE_SIZE);
		if (!err && head <= tail && tail < offset + len)
			err = rram_shmem_fops->fallocate(via, mode, tail,
							 offset + len - tail);
	} else {
		err = rram_shmem_fops->fallocate(via, mode, offset, len);
	}
	if (!err && READ_ONCE(f->tracking))
		rram_track_write(f, first, last - first + 1);
	return err;
}

static long rram_fallocate(struct file *file, int mode, loff_t offset, loff_t len)
{
	struct inode *inode = file_inode(file);
	struct rram_file *f = rram_file_of(inode);
	unsigned long first = offset >> PAGE_SHIFT;
	unsigned long last = (offset + len - 1) >> PAGE_SHIFT;
	long err;

	if (mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE))
		return -EOPNOTSUPP;
	if (down_write_killable(&inode->i_rwsem))
		return -EINTR;
	if (mode & FALLOC_FL_PUNCH_HOLE) {
		err = rram_punch(f, f->shmem, mode, offset, len);
	} else if (offset + len > i_size_read(inode)) {
		err = -ENOSPC;	/* ftruncate() is what makes RAM larger */
	} else {
		/* What is missing is not a hole to be filled with zeroes. */
		err = rram_fill(f, first, last);
		if (!err)
			err = rram_shmem_fops->fallocate(f->shmem, mode, offset,
							 len);
	}
	inode_unlock(inode);
	return err;
}

/* madvise(MADV_REMOVE) comes to the file that the VMA knows: shmem's. */
static long rram_inner_fallocate(struct file *inner, int mode, loff_t offset,
				 loff_t len)
{
	struct rram_file *f;
	long err;
	int idx;

	if (!(mode & FALLOC_FL_PUNCH_HOLE))
		return -EOPNOTSUPP;
	/* The caller keeps the inner file alone, and no lock of the VMA's. */
	idx = srcu_read_lock(&rram_inner_srcu);
	f = READ_ONCE(inner->private_data);
	if (!f) {
		err = rram_shmem_fops->fallocate(inner, mode, offset, len);
	} else if (down_write_killable(&f->inode.i_rwsem)) {
		err = -EINTR;
	} else {
		/*
		 * With our lock, as every other punch and write: a punch that
		 * has taken pages does without shmem's.
		 */
		err = rram_punch(f, inner, mode, offset, len);
		up_write(&f->inode.i_rwsem);
	}
	srcu_read_unlock(&rram_inner_srcu, idx);
	return err;
}

/* It grows with the file, whose size a user chooses. */
#define RRAM_GFP	(GFP_KERNEL_ACCOUNT | __GFP_NOWARN)

int rram_file_bitmaps(struct rram_file *f)
{
	size_t longs = BITS_TO_LONGS(f->npages);

	/*
	 * Kept until the file goes: a fault may look at them without a lock.
	 */
	if (!f->dirty)
		f->dirty = kvcalloc(longs, sizeof(long), RRAM_GFP);
	if (!f->missing)
		f->missing = kvcalloc(longs, sizeof(long), RRAM_GFP);
	if (!f->inflight)
		f->inflight = kvcalloc(longs, sizeof(long), RRAM_GFP);
	if (!f->lost)
		f->lost = kvcalloc(longs, sizeof(long), RRAM_GFP);
	if (!f->heat)
		f->heat = kvzalloc(f->npages, RRAM_GFP);
	return f->dirty && f->missing && f->inflight && f->lost && f->heat ?
	       0 : -ENOMEM;
}

int rram_file_init(struct rram_file *f)
{
	unsigned int i;

	mutex_init(&f->control);
	mutex_init(&f->lock);
	init_rwsem(&f->stale);
	for (i = 0; i < RRAM_WAITS; i++)
		init_waitqueue_head(&f->wait[i]);
	RCU_INIT_POINTER(f->session, NULL);
	f->npages = 0;
	f->nr_maps = 0;
	f->phase = RRAM_PHASE_PLAIN;
	f->tracking = false;
	f->frozen = false;
	f->large = false;
	f->dirty = NULL;
	f->missing = NULL;
	f->inflight = NULL;
	f->lost = NULL;
	f->heat = NULL;
	atomic_long_set(&f->nr_missing, 0);
	atomic_long_set(&f->nr_lost, 0);
	atomic64_set(&f->late_writes, 0);
	f->shmem = rram_shmem_new("remote_ram", 0);
	if (IS_ERR(f->shmem)) {
		int err = PTR_ERR(f->shmem);

		f->shmem = NULL;
		return err;
	}
	mutex_lock(&rram_vm_ops_lock);
	if (!rram_shmem_fops) {
		rram_inner_fops = *f->shmem->f_op;
		rram_inner_fops.fallocate = rram_inner_fallocate;
		rram_inner_fops.owner = NULL;
		rram_shmem_fops = f->shmem->f_op;
	}
	mutex_unlock(&rram_vm_ops_lock);
	f->shmem->f_op = &rram_inner_fops;
	f->shmem->private_data = f;
	/* Writes go through it, beyond 2 GiB too. */
	f->shmem->f_flags |= O_LARGEFILE;
	return 0;
}

void rram_file_destroy(struct rram_file *f)
{
	if (!f->shmem)
		return;
	rram_session_end(f);
	/*
	 * fput() may close the file after this module is gone, and a page may
	 * outlive the file: leave nothing of ours in it.
	 */
	f->shmem->f_op = rram_shmem_fops;
	WRITE_ONCE(f->shmem->private_data, NULL);
	/* Who is in the middle of a punch waited for READs that have ended. */
	synchronize_srcu(&rram_inner_srcu);
	fput(f->shmem);
	f->shmem = NULL;
	kvfree(f->dirty);
	kvfree(f->missing);
	kvfree(f->inflight);
	kvfree(f->lost);
	kvfree(f->heat);
}

const struct file_operations rram_file_operations = {
	.owner = THIS_MODULE,
	.open = generic_file_open,
	.llseek = generic_file_llseek,
	.read_iter = rram_read_iter,
	.write_iter = rram_write_iter,
	.mmap = rram_mmap,
	.fallocate = rram_fallocate,
	.fsync = noop_fsync,
	.unlocked_ioctl = rram_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
};
