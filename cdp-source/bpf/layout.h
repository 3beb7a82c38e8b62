// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// The layout of the pinned maps, as docs/format/tracker-maps.md gives it. src/tracker/{instance,bitmap}.rs hold the
// same numbers; whoever changes one raises LAYOUT in src/tracker/identity.rs.

#define BLOCK_SECTORS 8
#define VOLUMES_MAX 64
// Bios of one merged request; the kernel merges at most max_discard_segments of them.
#define BIOS_MAX 65536

// A summary bit stands for 64 words of `dirty`, a summary word for 4096.
#define SUMMARY_GROUP_SHIFT 6
#define SUMMARY_SPAN_SHIFT 12

// The filter of issued writes: 2^21 bits. A word of `dirty` has one word in it; the bit stays where it is.
#define ISSUED_BITS_LOG2 21
#define ISSUED_WORDS (1 << (ISSUED_BITS_LOG2 - 6))
#define ISSUED_INDEX(word) ((__u64)(word) * 0x9e3779b97f4a7c15ULL >> (64 - (ISSUED_BITS_LOG2 - 6)))

#define OPERATION_WRITE 1
#define OPERATION_DISCARD 3
#define OPERATION_PASSTHROUGH_OUT 35

struct control {
	__u64 active; // parity that is marked now
};

// One a possible CPU; a cache line.
struct gate {
	__u64 entries[2];
	__u64 exits[2];
	__u64 blind; // passthrough writes: without a range
	__u64 lost; // marks that could not be made: never, unless there is a bug
	__u64 unremembered; // bios whose range could not be kept until they complete
	__u64 unknown; // bios that completed without a range kept
};

// One a possible CPU and disk; a cache line. In sectors: completed, as /sys/block/X/stat counts them, and issued.
// `zeroed` is what WRITE_ZEROES and SECURE_ERASE completed, which the kernel counts as written, or not at all.
// No atomics: a CPU runs one program at a time that writes a field, and a second one that comes in an interrupt is
// passed over by the kernel and counted as missed (before Linux 6.2: may lose a count, which is taken for a loss).
struct tally {
	__u64 written;
	__u64 discarded;
	__u64 zeroed;
	__u64 completed_events;
	__u64 issued;
	__u64 issued_events;
	__u64 reserved[2];
};

// A window of a disk, in sectors; `word_base` is where its words begin in `dirty`.
struct volume {
	__u64 start;
	__u64 sectors;
	__u64 blocks;
	__u64 word_base;
};

// Key of `disks` is the kernel's dev_t of the whole disk.
struct disk {
	__u32 first_volume;
	__u32 volumes;
	__u32 index; // of its tally
	__u32 reserved;
};

struct identity {
	__u64 bytes;
	__u8 json[16376];
};

// Two places, and which one holds: replacing it is one store.
struct memo {
	__u64 current;
	struct {
		__u64 bytes;
		__u8 content[1024];
	} places[2];
};
