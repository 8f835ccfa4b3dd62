/* SPDX-License-Identifier: GPL-2.0-or-later WITH Linux-syscall-note */
/*
 * remote_ram: guest RAM as files whose pages arrive over RDMA.
 *
 * Every call is an ioctl on an open file of a remote_ram file system; the
 * file is one block of guest RAM. A file is in at most one session at a time:
 * as its source (RRAM_IOC_EXPORT) or as its destination (RRAM_IOC_ATTACH).
 * The session belongs to the file and not to the descriptor: it goes on when
 * the descriptor is closed or the process that made the call ends.
 *
 * The life of a session:
 *
 *   source                              destination
 *                                       ATTACH            -> LISTENING
 *   EXPORT            -> CONNECTED      (peer connects)   -> CONNECTED
 *   PRECOPY           -> PRECOPY
 *   (time is up)      -> CONNECTED
 *   SWITCH            -> POSTCOPY       (peer switches)   -> POSTCOPY
 *                                       (connection lost) -> RECONNECTING
 *   (last page left)  -> COMPLETE       (last page in)    -> COMPLETE
 *   RELEASE           -> NONE           RELEASE           -> NONE
 *
 * Before the switch every error ends in FAILED, on both sides, and the source
 * file is as it was. After the switch a lost connection is taken up again
 * until reconnect_ms have passed; then what has not arrived is LOST.
 *
 * All structures start with their own size in bytes, as the caller knows it;
 * a field that the caller does not know is left out, a field that the kernel
 * does not know must be zero. Reserved fields must be zero.
 */
#ifndef _UAPI_LINUX_REMOTE_RAM_H
#define _UAPI_LINUX_REMOTE_RAM_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define RRAM_FS_MAGIC		0x52524d46	/* f_type of statfs(2): "RRMF" */
#define RRAM_ABI_VERSION	1	/* of this file */
#define RRAM_WIRE_VERSION	4	/* of what two hosts say to each other */
#define RRAM_UUID_LEN		16
#define RRAM_TOKEN_LEN		16
#define RRAM_ADDR_LEN		128	/* a struct sockaddr_storage */
#define RRAM_HIST_BUCKETS	32

/**
 * enum rram_role - what a file is in its session
 * @RRAM_ROLE_NONE: it has none
 * @RRAM_ROLE_SOURCE: it is exported
 * @RRAM_ROLE_DESTINATION: it receives
 */
enum rram_role {
	RRAM_ROLE_NONE = 0,
	RRAM_ROLE_SOURCE = 1,
	RRAM_ROLE_DESTINATION = 2,
};

/**
 * enum rram_state - where a session is
 * @RRAM_STATE_NONE: there is no session
 * @RRAM_STATE_LISTENING: destination, waits for its source
 * @RRAM_STATE_CONNECTING: source, on its way to the destination
 * @RRAM_STATE_CONNECTED: connected; on a source, pre-copy does not run
 * @RRAM_STATE_PRECOPY: source, pre-copy runs
 * @RRAM_STATE_SWITCHING: the final set of pages is on its way
 * @RRAM_STATE_POSTCOPY: the VM is the destination's, pages go on arriving
 * @RRAM_STATE_RECONNECTING: as POSTCOPY, while there is no connection
 * @RRAM_STATE_COMPLETE: every page is at the destination
 * @RRAM_STATE_FAILED: ended before the switch; the source is as it was
 * @RRAM_STATE_LOST: ended after the switch with pages missing
 */
enum rram_state {
	RRAM_STATE_NONE = 0,
	RRAM_STATE_LISTENING = 1,
	RRAM_STATE_CONNECTING = 2,
	RRAM_STATE_CONNECTED = 3,
	RRAM_STATE_PRECOPY = 4,
	RRAM_STATE_SWITCHING = 5,
	RRAM_STATE_POSTCOPY = 6,
	RRAM_STATE_RECONNECTING = 7,
	RRAM_STATE_COMPLETE = 8,
	RRAM_STATE_FAILED = 9,
	RRAM_STATE_LOST = 10,
};

/**
 * enum rram_reason - why a session is not where it should be
 * @RRAM_REASON_NONE: nothing is wrong
 * @RRAM_REASON_VERSION: the peer speaks another version of the protocol
 * @RRAM_REASON_TOKEN: the token is not the destination's
 * @RRAM_REASON_UUID: the VM is not the one the destination waits for
 * @RRAM_REASON_SIZE: the two files differ in size
 * @RRAM_REASON_BUSY: the destination has a source already
 * @RRAM_REASON_STATE: the peer is not in a state to do that
 * @RRAM_REASON_PROTOCOL: the peer sent something malformed
 * @RRAM_REASON_UNREACHABLE: no route, no device, or nobody listens
 * @RRAM_REASON_TIMEOUT: it took longer than it may
 * @RRAM_REASON_DISCONNECTED: the connection was lost
 * @RRAM_REASON_ABORTED: somebody said RRAM_IOC_ABORT, here
 * @RRAM_REASON_PEER_ABORTED: somebody said RRAM_IOC_ABORT, at the peer
 * @RRAM_REASON_NO_MEMORY: memory ran out
 * @RRAM_REASON_DEVICE: the RDMA device failed, went away, or lacks what is
 *	needed (memory registration by work request, RDMA READ)
 */
enum rram_reason {
	RRAM_REASON_NONE = 0,
	RRAM_REASON_VERSION = 1,
	RRAM_REASON_TOKEN = 2,
	RRAM_REASON_UUID = 3,
	RRAM_REASON_SIZE = 4,
	RRAM_REASON_BUSY = 5,
	RRAM_REASON_STATE = 6,
	RRAM_REASON_PROTOCOL = 7,
	RRAM_REASON_UNREACHABLE = 8,
	RRAM_REASON_TIMEOUT = 9,
	RRAM_REASON_DISCONNECTED = 10,
	RRAM_REASON_ABORTED = 11,
	RRAM_REASON_PEER_ABORTED = 12,
	RRAM_REASON_NO_MEMORY = 13,
	RRAM_REASON_DEVICE = 14,
};

/**
 * struct rram_session_args - RRAM_IOC_EXPORT and RRAM_IOC_ATTACH
 * @size: sizeof(struct rram_session_args)
 * @flags: must be 0
 * @uuid: the VM (and block) that is moved; the same on both sides
 * @token: secret of this session; the same on both sides, used once
 * @addr: a struct sockaddr_in or sockaddr_in6. EXPORT: the destination's.
 *	ATTACH: where to listen; port 0 takes a free one, and the address that
 *	was taken is written back.
 * @connect_ms: EXPORT: how long to try before the call fails (0: 10 s)
 * @reconnect_ms: after the switch, how long without a connection until what
 *	is missing counts as lost (0: 1 h, ~0: for ever)
 * @heartbeat_ms: how often a sign of life is sent (0: 1 s)
 * @dead_ms: how long without one until the connection counts as lost (0: 5 s)
 * @bandwidth: bytes a second of what nobody waits for (0: no limit)
 * @reason: out, enum rram_reason when the call fails
 * @reserved: must be 0
 *
 * EXPORT returns when both queue pairs are connected. Errors: EBUSY (the file
 * is in a session), EINVAL (size of the file is 0, bad address), ETIMEDOUT,
 * ECONNREFUSED (@reason says why), EHOSTUNREACH, ENODEV, ENOMEM, EINTR.
 *
 * ATTACH returns when the file listens. What the file held is dropped. Errors:
 * EBUSY (in a session, or mapped), EINVAL, EADDRINUSE, EADDRNOTAVAIL, ENODEV,
 * ENOMEM, EOPNOTSUPP (the host makes huge pages of all shmem: shmem_enabled is
 * force). The memory cgroup of the caller is charged for pages that arrive
 * before anybody faults on them.
 */
struct rram_session_args {
	__u32 size;
	__u32 flags;
	__u8 uuid[RRAM_UUID_LEN];
	__u8 token[RRAM_TOKEN_LEN];
	__u8 addr[RRAM_ADDR_LEN];
	__u32 connect_ms;
	__u32 reconnect_ms;
	__u32 heartbeat_ms;
	__u32 dead_ms;
	__u64 bandwidth;
	__u32 reason;
	__u32 reserved;
};

/**
 * struct rram_precopy_args - RRAM_IOC_PRECOPY, on a source
 * @size: sizeof(struct rram_precopy_args)
 * @flags: must be 0
 * @timeout_ms: how long pages are copied ahead; 0 stops a running pre-copy
 * @stop_pages: stop earlier once no more pages than that are left
 * @bandwidth: bytes a second (0: as given to EXPORT)
 *
 * Returns at once; RRAM_IOC_WAIT for RRAM_STATE_CONNECTED waits for its end.
 * May be called again, also while one runs. Errors: EINVAL, ENOTCONN, EBUSY
 * (switched already).
 */
struct rram_precopy_args {
	__u32 size;
	__u32 flags;
	__u32 timeout_ms;
	__u32 reserved;
	__u64 stop_pages;
	__u64 bandwidth;
};

/**
 * struct rram_switch_args - RRAM_IOC_SWITCH, on a source
 * @size: sizeof(struct rram_switch_args)
 * @flags: must be 0
 * @timeout_ms: how long to wait for the destination (0: 10 s)
 * @reason: out, enum rram_reason when the call fails
 * @dirty_pages: out, how many pages the destination does not have
 * @duration_us: out, from the call to the destination's answer
 *
 * The caller has stopped the VM and drained its I/O. When the call returns 0,
 * the destination has dropped all that is stale and will fetch all that is
 * missing: the VM may run there, and must not run here again. When it fails,
 * the session has FAILED and the VM may go on here; the destination must not
 * run, also where it was the answer that was lost.
 * Errors: EINVAL, ENOTCONN, ETIMEDOUT, ECONNRESET, ECANCELED.
 */
struct rram_switch_args {
	__u32 size;
	__u32 flags;
	__u32 timeout_ms;
	__u32 reason;
	__u64 dirty_pages;
	__u64 duration_us;
};

/**
 * struct rram_wait_args - RRAM_IOC_WAIT
 * @size: sizeof(struct rram_wait_args)
 * @states: bits (1 << enum rram_state) to wait for; COMPLETE, FAILED, LOST
 *	and NONE always end the wait
 * @timeout_ms: how long (~0: for ever)
 * @state: out, enum rram_state
 * @reason: out, enum rram_reason
 * @reserved: must be 0
 *
 * Errors: ETIMEDOUT, EINTR, EINVAL.
 */
struct rram_wait_args {
	__u32 size;
	__u32 states;
	__u32 timeout_ms;
	__u32 state;
	__u32 reason;
	__u32 reserved;
};

/**
 * enum rram_tunable - what RRAM_IOC_TUNE sets
 * @RRAM_TUNE_BANDWIDTH: bytes a second of what nobody waits for (0: no limit)
 * @RRAM_TUNE_BUSY_POLL_US: how long a faulting thread spins before it sleeps
 * @RRAM_TUNE_BATCH_PAGES: pages of one background READ, 1 to 128
 * @RRAM_TUNE_BACKGROUND: 0 stops the background pull, 1 lets it go on
 */
enum rram_tunable {
	RRAM_TUNE_BANDWIDTH = 1,
	RRAM_TUNE_BUSY_POLL_US = 2,
	RRAM_TUNE_BATCH_PAGES = 3,
	RRAM_TUNE_BACKGROUND = 4,
};

/**
 * struct rram_tune_args - RRAM_IOC_TUNE
 * @size: sizeof(struct rram_tune_args)
 * @what: enum rram_tunable
 * @value: its new value
 *
 * Errors: EINVAL, ENOTCONN (no session).
 */
struct rram_tune_args {
	__u32 size;
	__u32 what;
	__u64 value;
};

/**
 * struct rram_process_args - RRAM_IOC_ALLOW_COLLAPSE
 * @size: sizeof(struct rram_process_args)
 * @pid: a process, as the caller's namespace knows it
 *
 * What a process maps while pages are missing can't be made of huge pages, then
 * or later. When all pages are here, this allows it for what @pid has mapped
 * of the file by now: process_madvise(MADV_COLLAPSE) does it, also for a VM that
 * runs. While the file is a source with huge pages, a write makes all of a
 * huge page count as changed.
 *
 * Errors: EBUSY (pages are missing), ESRCH, ENOENT (it does not map the file),
 * EINTR.
 */
struct rram_process_args {
	__u32 size;
	__u32 pid;
};

/**
 * struct rram_stats - RRAM_IOC_STATS
 *
 * After the switch a source shows what its destination tells it, about once a
 * heartbeat and at the end: @pages_demand, @pages_bubble, @pages_background,
 * @pages_missing, @bytes_after, the faults, their times and histograms.
 *
 * @size: sizeof(struct rram_stats)
 * @abi: out, RRAM_ABI_VERSION of the kernel
 * @role: enum rram_role
 * @state: enum rram_state
 * @reason: enum rram_reason
 * @rounds: pre-copy rounds begun (source)
 * @pages: pages of the file
 * @pages_ahead: pages copied before the switch, each time counted
 * @pages_zero: pages that were named as zero and not sent
 * @pages_demand: pages fetched because somebody waited
 * @pages_bubble: pages fetched around those, nobody waited yet
 * @pages_background: pages fetched in the background otherwise
 * @pages_stale: pages dropped at the switch because they had changed since
 * @pages_missing: pages that are not here (destination)
 * @pages_dirty: pages that the destination lacks, before the switch (source);
 *	at the switch, how many it lacked
 * @pages_lost: pages that the destination lacks and will not get: the source
 *	can't read them, or is gone for good; @pages_missing does not count those
 *	that the source can't read. Once all else is in: those that are not here
 *	still, also when the session was released
 * @bytes_ahead: bytes read by the destination before the switch
 * @bytes_after: bytes read by the destination after the switch
 * @late_writes: writes to the source after the switch: must stay 0
 * @faults_nowait: faults on missing pages that could not wait
 * @faults_retry: faults that waited without the lock
 * @faults_plain: faults that waited with the lock held
 * @faults_joined: faults on a page that was on its way already
 * @faults_poison: faults answered with a machine check
 * @wait_ns_total: time that faults waited
 * @wait_ns_max: the longest of these waits
 * @read_ns_total: time from posting an urgent READ to its completion
 * @reconnects: connections taken up again
 * @keys: memory registrations made (source) or received (destination)
 * @keys_retired: registrations replaced because pages behind them changed
 * @switch_us: how long the switch took
 * @precopy_us: how long pre-copy ran
 * @remaining_us: estimate of how long what is left will take; ~0: unknown
 * @rate: bytes a second, of late
 * @memory: bytes the module holds for this file besides its pages
 * @wait_hist: faults by time waited; bucket n holds [2^(n-1), 2^n) us,
 *	bucket 0 what took less than 1 us
 * @read_hist: urgent READs by duration, in the same buckets
 */
struct rram_stats {
	__u32 size;
	__u32 abi;
	__u32 role;
	__u32 state;
	__u32 reason;
	__u32 rounds;
	__u64 pages;
	__u64 pages_ahead;
	__u64 pages_zero;
	__u64 pages_demand;
	__u64 pages_bubble;
	__u64 pages_background;
	__u64 pages_stale;
	__u64 pages_missing;
	__u64 pages_dirty;
	__u64 pages_lost;
	__u64 bytes_ahead;
	__u64 bytes_after;
	__u64 late_writes;
	__u64 faults_nowait;
	__u64 faults_retry;
	__u64 faults_plain;
	__u64 faults_joined;
	__u64 faults_poison;
	__u64 wait_ns_total;
	__u64 wait_ns_max;
	__u64 read_ns_total;
	__u64 reconnects;
	__u64 keys;
	__u64 keys_retired;
	__u64 switch_us;
	__u64 precopy_us;
	__u64 remaining_us;
	__u64 rate;
	__u64 memory;
	__u64 wait_hist[RRAM_HIST_BUCKETS];
	__u64 read_hist[RRAM_HIST_BUCKETS];
};

#define RRAM_IOC_MAGIC		0xb6

#define RRAM_IOC_EXPORT		_IOWR(RRAM_IOC_MAGIC, 0x10, struct rram_session_args)
#define RRAM_IOC_ATTACH		_IOWR(RRAM_IOC_MAGIC, 0x11, struct rram_session_args)
#define RRAM_IOC_PRECOPY	_IOW(RRAM_IOC_MAGIC, 0x12, struct rram_precopy_args)
#define RRAM_IOC_SWITCH		_IOWR(RRAM_IOC_MAGIC, 0x13, struct rram_switch_args)
#define RRAM_IOC_WAIT		_IOWR(RRAM_IOC_MAGIC, 0x14, struct rram_wait_args)
#define RRAM_IOC_STATS		_IOWR(RRAM_IOC_MAGIC, 0x15, struct rram_stats)
#define RRAM_IOC_TUNE		_IOW(RRAM_IOC_MAGIC, 0x16, struct rram_tune_args)
/*
 * ABORT ends a session that is not complete: FAILED before the switch; after
 * it LOST, on a destination, and refused on a source (EBUSY) while pages are
 * missing at the destination. RELEASE forgets a session that has ended
 * (EBUSY: it has not); the file is a plain file again.
 */
#define RRAM_IOC_ABORT		_IO(RRAM_IOC_MAGIC, 0x17)
#define RRAM_IOC_RELEASE	_IO(RRAM_IOC_MAGIC, 0x18)
/*
 * TAKE_BACK ends a source's session after the switch, as FAILED: for a VM that
 * never ran at the destination, because something else of its migration went
 * wrong there. What the destination is missing is lost to it.
 */
#define RRAM_IOC_TAKE_BACK	_IO(RRAM_IOC_MAGIC, 0x19)
#define RRAM_IOC_ALLOW_COLLAPSE	_IOW(RRAM_IOC_MAGIC, 0x1a, struct rram_process_args)

#endif /* _UAPI_LINUX_REMOTE_RAM_H */
