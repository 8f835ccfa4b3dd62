/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the two hosts of a session say to each other.
 *
 * The source connects twice: once for the urgent queue pair, which carries
 * nothing but READs of pages that somebody waits for, and once for the bulk
 * queue pair, which carries background READs and all messages. Both carry a
 * struct rram_hello in the connection's private data. Integers are little
 * endian. The peer is not trusted: every field is checked by its reader.
 */
#ifndef _RRAM_WIRE_H
#define _RRAM_WIRE_H

#include <linux/types.h>
#include <uapi/linux/remote_ram.h>

#define RRAM_MAGIC		0x4d415252	/* "RRAM" */
/* Pages behind one memory key: as many as cxgb4 takes, which takes the least. */
#define RRAM_CHUNK_SHIFT	7
#define RRAM_MSG_SIZE		4096
#define RRAM_MSG_DEPTH		64		/* messages that a peer may have under way */
#define RRAM_MSG_SPARE		8		/* receives kept for messages of type CREDIT */

enum rram_link_kind {
	RRAM_LINK_URGENT = 0,
	RRAM_LINK_BULK = 1,
	RRAM_LINKS,
};

/**
 * struct rram_hello - private data of a connection request
 * @magic: RRAM_MAGIC
 * @version: RRAM_WIRE_VERSION
 * @link: enum rram_link_kind
 * @flags: must be 0
 * @uuid: which VM
 * @bytes: size of the file
 * @epoch: counts the connections of a session, from 1
 * @nonce: chosen at random for this request
 * @proof: that the source knows the session's secret, which nobody is told:
 *	see rram_proof()
 *
 * 52 bytes: RDMA CM leaves 56 on InfiniBand and RoCE.
 */
struct rram_hello {
	__le32 magic;
	__le16 version;
	__u8 link;
	__u8 flags;
	__u8 uuid[RRAM_UUID_LEN];
	__le64 bytes;
	__le32 epoch;
	__le64 nonce;
	__le64 proof;
} __packed;

/**
 * struct rram_answer - private data of an accept or a reject
 * @magic: RRAM_MAGIC
 * @version: what the answering side speaks
 * @reason: enum rram_reason; 0 in an accept
 * @proof: in an accept: that the destination knows the session's secret
 */
struct rram_answer {
	__le32 magic;
	__le16 version;
	__le16 reason;
	__le64 proof;
} __packed;

enum rram_msg_type {
	RRAM_MSG_CREDIT = 1,	/* either way: nothing but the header */
	RRAM_MSG_PING,		/* either way: a sign of life */
	RRAM_MSG_ABORT,		/* either way: struct rram_msg_abort */
	RRAM_MSG_OFFER,		/* source: struct rram_msg_offer */
	RRAM_MSG_PULLED,	/* destination: struct rram_msg_pulled */
	RRAM_MSG_DIRTY,		/* source: struct rram_msg_dirty */
	RRAM_MSG_SWITCH,	/* source: struct rram_msg_switch */
	RRAM_MSG_SWITCHED,	/* destination: struct rram_msg_switch, echoed */
	RRAM_MSG_WANT,		/* destination: struct rram_msg_want */
	RRAM_MSG_KEY,		/* source: struct rram_msg_key */
	RRAM_MSG_COMPLETE,	/* destination: it has every page */
	RRAM_MSG_BYE,		/* source: it knows */
	RRAM_MSG_PROGRESS,	/* destination: struct rram_msg_progress */
	RRAM_MSG_TYPES,
};

/**
 * struct rram_msg - header of every message
 * @magic: RRAM_MAGIC
 * @type: enum rram_msg_type
 * @credit: receives that the sender has posted since its last message
 * @bytes: of the whole message
 */
struct rram_msg {
	__le32 magic;
	__u8 type;
	__u8 credit;
	__le16 bytes;
} __packed;

/**
 * struct rram_msg_abort - the sender gives up
 * @msg: header
 * @reason: enum rram_reason
 */
struct rram_msg_abort {
	struct rram_msg msg;
	__le32 reason;
} __packed;

/**
 * struct rram_wire_key - how to READ a chunk
 * @chunk: which
 * @rkey: remote key; one more than the last chunk's is not valid
 * @iova: address of the chunk's first page
 */
struct rram_wire_key {
	__le32 chunk;
	__le32 rkey;
	__le64 iova;
} __packed;

/**
 * struct rram_wire_run - pages within a chunk
 * @first: the first of them, counted in the chunk
 * @nr: how many, at least 1; with RRAM_RUN_ZERO set: they are all zero
 */
struct rram_wire_run {
	__le16 first;
	__le16 nr;
} __packed;

#define RRAM_RUN_ZERO	0x8000

/**
 * struct rram_msg_offer - pages that may be copied ahead
 * @msg: header
 * @seq: comes back in PULLED
 * @key: of the chunk; rkey and iova are 0 if all its runs are zero
 * @nr: number of runs
 * @run: the runs
 */
struct rram_msg_offer {
	struct rram_msg msg;
	__le32 seq;
	struct rram_wire_key key;
	__le32 nr;
	struct rram_wire_run run[];
} __packed;

/**
 * struct rram_msg_pulled - an offer has been taken
 * @msg: header
 * @seq: of the offer
 */
struct rram_msg_pulled {
	struct rram_msg msg;
	__le32 seq;
} __packed;

/**
 * struct rram_wire_dirty - pages that the destination does not have
 * @first: the first of them, counted in the file
 * @nr: how many; with RRAM_DIRTY_BITS, the bits that follow, a multiple of 64
 * @heat: enum rram_heat of all of them
 * @flags: RRAM_DIRTY_*
 */
struct rram_wire_dirty {
	__le32 first;
	__le16 nr;
	__u8 heat;
	__u8 flags;
} __packed;

#define RRAM_DIRTY_BITS	1	/* @nr bits follow: only pages with a 1 */
#define RRAM_DIRTY_ZERO	2	/* they are all zero */
#define RRAM_DIRTY_REKEY	4	/* keys of these chunks are void */
#define RRAM_DIRTY_LOST	8	/* the source can't read them; after the switch */
#define RRAM_DIRTY_FLAGS	15

/**
 * struct rram_msg_dirty - a part of the final set
 * @msg: header
 * @nr: number of entries
 * @entry: struct rram_wire_dirty, each with its bits
 */
struct rram_msg_dirty {
	struct rram_msg msg;
	__le32 nr;
	__u8 entry[];
} __packed;

/**
 * struct rram_msg_switch - the final set is complete
 * @msg: header
 * @pages: number of pages in it, zero pages not counted
 */
struct rram_msg_switch {
	struct rram_msg msg;
	__le64 pages;
} __packed;

/**
 * struct rram_msg_want - keys that somebody waits for
 * @msg: header
 * @nr: number of chunks
 * @chunk: the chunks
 */
struct rram_msg_want {
	struct rram_msg msg;
	__le32 nr;
	__le32 chunk[];
} __packed;

/**
 * struct rram_msg_key - keys of chunks
 * @msg: header
 * @nr: number of keys
 * @key: the keys
 */
struct rram_msg_key {
	struct rram_msg msg;
	__le32 nr;
	struct rram_wire_key key[];
} __packed;

/**
 * struct rram_msg_progress - how the destination fares, for people to see
 * @msg: header
 * @missing: pages that have not arrived
 * @demand: the other fields are those of struct rram_stats
 */
struct rram_msg_progress {
	struct rram_msg msg;
	__le64 missing;
	__le64 demand;
	__le64 bubble;
	__le64 background;
	__le64 bytes_after;
	__le64 nowait;
	__le64 retry;
	__le64 plain;
	__le64 joined;
	__le64 wait_ns_total;
	__le64 wait_ns_max;
	__le64 read_ns_total;
	__le64 rate;
	__le64 wait_hist[RRAM_HIST_BUCKETS];
	__le64 read_hist[RRAM_HIST_BUCKETS];
} __packed;

#endif /* _RRAM_WIRE_H */
