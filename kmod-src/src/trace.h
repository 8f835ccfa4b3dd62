/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tracepoints: /sys/kernel/tracing/events/remote_ram/.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM remote_ram

#if !defined(_RRAM_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _RRAM_TRACE_H

#include <linux/tracepoint.h>

#include "remote_ram.h"

TRACE_EVENT(rram_fault,
	TP_PROTO(struct rram_file *f, unsigned long page, unsigned int flags),
	TP_ARGS(f, page, flags),
	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(unsigned long, page)
		__field(unsigned int, flags)
	),
	TP_fast_assign(
		__entry->ino = f->inode.i_ino;
		__entry->page = page;
		__entry->flags = flags;
	),
	TP_printk("ino=%lu page=%lu flags=%#x", __entry->ino, __entry->page,
		  __entry->flags)
);

TRACE_EVENT(rram_fault_done,
	TP_PROTO(struct rram_file *f, unsigned long page, int err),
	TP_ARGS(f, page, err),
	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(unsigned long, page)
		__field(int, err)
	),
	TP_fast_assign(
		__entry->ino = f->inode.i_ino;
		__entry->page = page;
		__entry->err = err;
	),
	TP_printk("ino=%lu page=%lu err=%d", __entry->ino, __entry->page,
		  __entry->err)
);

/* The frame of the first page of what the device was told. */
DECLARE_EVENT_CLASS(rram_frame,
	TP_PROTO(struct rram_file *f, unsigned long page, unsigned int nr,
		 unsigned long pfn),
	TP_ARGS(f, page, nr, pfn),
	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(unsigned long, page)
		__field(unsigned int, nr)
		__field(unsigned long, pfn)
	),
	TP_fast_assign(
		__entry->ino = f->inode.i_ino;
		__entry->page = page;
		__entry->nr = nr;
		__entry->pfn = pfn;
	),
	TP_printk("ino=%lu page=%lu nr=%u pfn=%lu", __entry->ino,
		  __entry->page, __entry->nr, __entry->pfn)
);

/* A READ into these pages. */
DEFINE_EVENT(rram_frame, rram_sink,
	TP_PROTO(struct rram_file *f, unsigned long page, unsigned int nr,
		 unsigned long pfn),
	TP_ARGS(f, page, nr, pfn)
);

/* A key by which a peer READs these pages. */
DEFINE_EVENT(rram_frame, rram_key,
	TP_PROTO(struct rram_file *f, unsigned long page, unsigned int nr,
		 unsigned long pfn),
	TP_ARGS(f, page, nr, pfn)
);

TRACE_EVENT(rram_read,
	TP_PROTO(struct rram_file *f, unsigned long page, unsigned int nr,
		 int cause, u64 ns, int status),
	TP_ARGS(f, page, nr, cause, ns, status),
	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(unsigned long, page)
		__field(unsigned int, nr)
		__field(int, cause)
		__field(u64, ns)
		__field(int, status)
	),
	TP_fast_assign(
		__entry->ino = f->inode.i_ino;
		__entry->page = page;
		__entry->nr = nr;
		__entry->cause = cause;
		__entry->ns = ns;
		__entry->status = status;
	),
	TP_printk("ino=%lu page=%lu nr=%u cause=%s ns=%llu status=%d",
		  __entry->ino, __entry->page, __entry->nr,
		  __print_symbolic(__entry->cause,
				   { RRAM_CAUSE_AHEAD, "ahead" },
				   { RRAM_CAUSE_DEMAND, "demand" },
				   { RRAM_CAUSE_BUBBLE, "bubble" },
				   { RRAM_CAUSE_BACKGROUND, "background" }),
		  __entry->ns, __entry->status)
);

TRACE_EVENT(rram_harvest,
	TP_PROTO(struct rram_file *f, unsigned long first, unsigned int pages),
	TP_ARGS(f, first, pages),
	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(unsigned long, first)
		__field(unsigned int, pages)
	),
	TP_fast_assign(
		__entry->ino = f->inode.i_ino;
		__entry->first = first;
		__entry->pages = pages;
	),
	TP_printk("ino=%lu first=%lu pages=%u", __entry->ino, __entry->first,
		  __entry->pages)
);

TRACE_EVENT(rram_state,
	TP_PROTO(struct rram_file *f, int role, int from, int to, int reason),
	TP_ARGS(f, role, from, to, reason),
	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(int, role)
		__field(int, from)
		__field(int, to)
		__field(int, reason)
	),
	TP_fast_assign(
		__entry->ino = f->inode.i_ino;
		__entry->role = role;
		__entry->from = from;
		__entry->to = to;
		__entry->reason = reason;
	),
	TP_printk("ino=%lu role=%d %d->%d reason=%d", __entry->ino,
		  __entry->role, __entry->from, __entry->to, __entry->reason)
);

TRACE_EVENT(rram_cm,
	TP_PROTO(struct rram_file *f, int event, int status),
	TP_ARGS(f, event, status),
	TP_STRUCT__entry(
		__field(unsigned long, ino)
		__field(int, event)
		__field(int, status)
	),
	TP_fast_assign(
		__entry->ino = f->inode.i_ino;
		__entry->event = event;
		__entry->status = status;
	),
	TP_printk("ino=%lu event=%d status=%d", __entry->ino, __entry->event,
		  __entry->status)
);

#endif /* _RRAM_TRACE_H */

#undef TRACE_INCLUDE_PATH
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_PATH .
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
