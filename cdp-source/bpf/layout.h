// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// The layout of the pinned maps, as docs/format/tracker-maps.md gives it. src/tracker/{instance,loading,bitmap}.rs hold
// the same numbers; whoever changes one raises LAYOUT in src/tracker/identity.rs.

#define VOLUMES_MAX 64
// Bios of one merged request; the kernel merges at most max_discard_segments of them.
#define BIOS_MAX 65536

// A summary bit stands for 64 words of `dirty`, a summary word for 4096.
#define SUMMARY_GROUP_SHIFT 6
#define SUMMARY_SPAN_SHIFT 12

// The filter of issued writes: 2^21 bits. A word of `dirty` has one word in it; the bit stays where it is. Within 2^15
// words (8 GiB at a block a bit) words keep their order, so that what is near in `dirty` is near here, in few cache lines
// and pages; each such region is turned by a number of its own, so that what repeats on a disk does not meet itself.
#define ISSUED_WORDS_LOG2 15
#define ISSUED_WORDS (1 << ISSUED_WORDS_LOG2)
#define ISSUED_TURN(word) (((word) >> ISSUED_WORDS_LOG2) * 0x9e3779b97f4a7c15ULL >> (64 - ISSUED_WORDS_LOG2))
#define ISSUED_INDEX(word) (((word) ^ ISSUED_TURN(word)) & (ISSUED_WORDS - 1))

#define OPERATION_WRITE 1
#define OPERATION_DISCARD 3
#define OPERATION_WRITE_ZEROES 9
#define OPERATION_PASSTHROUGH_OUT 35
#define FLAG_PREFLUSH (1U << 18)
// Bit of bi_flags: the bio is a clone, or a part that was split off.
#define BIO_CLONED 1

struct control {
	__u64 active; // parity that is marked now
	__u64 discards; // entries of `discards` that are in use
	__u64 paths; // entries of `paths`
	__u64 answered; // by user space: how many events that leave marks in doubt it has answered for
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

// One a possible CPU and disk; two cache lines, of which the second is hardly ever touched. In sectors: completed, as /sys/block/X/stat counts them, and issued.
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
	__u64 remapped; // writes a stacked driver sent on to this disk: issued ones again, or for the first time
	__u64 origin; // of CPU 0, by user space: sectors the kernel had written beyond `written`, at least
	__u64 given_back; // issued, and given back before they became a request
	__u64 reserved[7];
};

// A window of a disk, in sectors; `word_base` is where its words begin in `dirty`; a bit stands for 2^bit_shift sectors.
struct volume {
	__u64 start;
	__u64 sectors;
	__u64 bits;
	__u64 word_base;
	__u64 bit_shift;
	__u64 reserved[3];
};

// Key of `disks` is the kernel's dev_t of the whole disk.
struct disk {
	__u32 first_volume;
	__u32 volumes;
	__u32 index; // of its tally
	__u32 bio_based;
};

// Key of `paths`: a hidden disk's name, filled up with zeros. Its value is the key in `disks` of the disk it is a path of.
#define DISK_NAME_BYTES 32
#define PATHS_MAX 1024

// What a bio that is on its way was issued for; key of `ranges` is the bio's address.
struct bio_range {
	__u64 sector;
	__u64 sectors;
	__u32 dev;
	__u32 operation;
};

// A discard or write-zeroes on its way. `left` is 0 where the entry is free, RESERVED while it is being filled in.
#define DISCARDS_MAX 32
#define RESERVED ~0ULL
struct discard {
	__u64 left; // sectors not completed
	__u64 start;
	__u64 end;
	__u64 dev;
	__u64 touched; // another write was issued or completed within it
	__u64 reserved[3];
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
