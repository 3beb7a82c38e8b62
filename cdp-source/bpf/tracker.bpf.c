// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Marks which 4 KiB blocks of the tracked volumes are written.
//
// Owns: the marking of issued and completed writes in the pinned maps described in docs/format/tracker-maps.md.
// Invariant: a mark is made before `exits` counts the run that makes it, and a run counts itself in `entries` before
// it looks which parity is active. Whoever flips `active`, and then sees all exits and all entries of the old parity
// agree, holds every mark made in it.
// Does not: decide what the counts mean, nor what a hole bit is worth (user space does).
//
// Which completion counts is chosen by the kind of disk, never both. A request-based disk completes its requests
// (block_rq_complete, found by the request's queue). A bio-based one (device-mapper, LVM, md, zram) ends its bios
// (block_bio_complete). Linux' block/, 5.17 to 6.18, was read for what follows; only zram and loop were run.
// * block_bio_queue comes once for a bio, when it is submitted first: the flag BIO_TRACE_COMPLETION is set then
//   (submit_bio_noacct_nocheck), and a bio that has it is not announced again. By completion its bi_iter may have been
//   advanced, trimmed or remapped, so the range is kept at issue, under the bio's address.
// * bio_endio announces the completion of a bio that has that flag, before anybody who waits for the bio is told.
//   A request that completes clears it first (blk_update_request: "already been traced"): a bio of a request-based disk
//   is never counted here, and its range never kept; one that ends here was given back before it became a request.
// * A bio that is split (bio_split) goes on as two: the front is a clone that was never announced and ends with
//   BIO_CLONED set, chained to the rest; the rest is the bio that was announced, and ends, all of it once, when every
//   part has (bio_remaining_done). So a clone without a range is a part, whose whole will end. Parents of a chain
//   (bio_chain) are bios like any other. What device-mapper sends down is new clones; they are announced for the lower disk.
// * A stacked driver may send the same bio on to another disk (bio_set_dev: md without accounting, NVMe multipath heads).
//   That is announced as block_bio_remap alone: the issue mark of the lower disk is made there. blk_partition_remap
//   announces itself too, with the device the bio is on already; it comes before block_bio_queue, and needs nothing.
//   If the lower disk is request-based, the upper bio's completion is never announced (see above) and its range stays
//   until the bio's address is used again: such an upper disk never agrees with the kernel's counts (`DISAGREEMENTS_MAX` in
//   trust.rs), or fills the table, and both put it in doubt.
//
// CO-RE without vmlinux.h: only the fields that are used are declared, and found by name at load.

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "layout.h"

typedef __u64 sector_t;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct block_device {
	sector_t bd_start_sect;
	__u32 bd_dev;
	struct gendisk *bd_disk;
};
struct gendisk {
	char disk_name[DISK_NAME_BYTES];
	struct block_device *part0;
};
struct bvec_iter {
	sector_t bi_sector;
	unsigned int bi_size;
};
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	unsigned int bi_opf;
	unsigned short bi_flags;
	__u8 bi_status;
	struct bvec_iter bi_iter;
};
struct request_queue {
	struct gendisk *disk;
};
struct request {
	struct request_queue *q;
	unsigned int cmd_flags;
	sector_t __sector;
	unsigned int __data_len;
	struct bio *bio;
};
#pragma clang attribute pop

// Sizes that depend on the group or the machine are set by the loader.
#define WORDS(map_name, entries)                                                                                       \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                      \
		__uint(map_flags, BPF_F_MMAPABLE);                                                                     \
		__uint(max_entries, entries);                                                                          \
		__type(key, __u32);                                                                                    \
		__type(value, __u64);                                                                                  \
	} map_name SEC(".maps")
#define RECORDS(map_name, record, entries)                                                                             \
	struct {                                                                                                       \
		__uint(type, BPF_MAP_TYPE_ARRAY);                                                                      \
		__uint(map_flags, BPF_F_MMAPABLE);                                                                     \
		__uint(max_entries, entries);                                                                          \
		__type(key, __u32);                                                                                    \
		__type(value, record);                                                                                 \
	} map_name SEC(".maps")

WORDS(dirty_0, 1);
WORDS(dirty_1, 1);
WORDS(summary_0, 1);
WORDS(summary_1, 1);
WORDS(issued_0, ISSUED_WORDS);
WORDS(issued_1, ISSUED_WORDS);
WORDS(holes, 1);
// Written by user space alone; the programs never look at them. They are here so that one loader makes all maps.
WORDS(unacked, 1);
RECORDS(identity, struct identity, 1);
RECORDS(memo, struct memo, 1);

RECORDS(control, struct control, 1);
RECORDS(gates, struct gate, 1);
RECORDS(tallies, struct tally, 1);
RECORDS(volumes, struct volume, VOLUMES_MAX);
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, VOLUMES_MAX);
	__type(key, __u32);
	__type(value, struct disk);
} disks SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PATHS_MAX);
	__type(key, char[DISK_NAME_BYTES]);
	__type(value, __u32);
} paths SEC(".maps");
RECORDS(discards, struct discard, DISCARDS_MAX);
// Preallocated; as large as the loader says, and of one entry where no disk is bio-based.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, __u64);
	__type(value, struct bio_range);
} ranges SEC(".maps");

// What a run marks: sectors of a disk, for the windows of `volumes` that begin at `first_volume`.
struct range {
	__u64 sector;
	__u64 sectors;
	__u32 first_volume;
	__u32 volumes;
	__u32 parities; // bit 0, bit 1
	__u32 issue;
	__u64 next_bio;
	__u32 lost;
	__u32 dev;
	__u32 hole; // its completion makes holes
	__u32 takes_holes_back;
};

// What it marks in one volume: blocks, counted from the volume's start.
struct span {
	__u64 first_block;
	__u64 last_block;
	__u64 word_base;
	__u32 parities;
	__u32 issue;
	__u32 lost;
};

// The atomics whose result is used are full barriers; the others are relaxed on arm64. This uses the result.
#define CONSUME(value) asm volatile("" : : "r"(value))

static __always_inline void count(__u64 *counter)
{
	__sync_fetch_and_add(counter, 1);
}

// Sets the bits of `mask` in a word that held `seen`, unless all were set: nobody clears them while this run is
// counted in.
static __always_inline void set_bits(__u64 *word, __u64 seen, __u64 mask)
{
	if ((seen & mask) != mask)
		CONSUME(__sync_fetch_and_or(word, mask));
}

static __always_inline void clear_bits(__u64 *word, __u64 seen, __u64 mask)
{
	if (seen & mask)
		CONSUME(__sync_fetch_and_and(word, ~mask));
}

#define SEEN(word) (*(volatile __u64 *)(word))

// A write is marked in both filters where a build wants conflicts from completions.
#ifdef SABOTAGE_COMPLETION_ONLY
#define MARKS_ISSUED(issue) (!(issue))
#define MARKS_DIRTY(issue) (!(issue))
#elif defined(SABOTAGE_ISSUE_ONLY)
#define MARKS_ISSUED(issue) (issue)
#define MARKS_DIRTY(issue) (issue)
#else
#define MARKS_ISSUED(issue) (issue)
#define MARKS_DIRTY(issue) 1
#endif

// The words of a mark are spread over memory. All are looked at before the first is changed, so that waiting for one is
// waiting for all: an atomic waits for what is before it and holds up what comes after.
#define MARK_IN(parity)                                                                                                \
	static __always_inline int mark_in_##parity(__u64 word, __u64 mask, __u32 issue)                               \
	{                                                                                                              \
		__u32 index = word, summary_index = word >> SUMMARY_SPAN_SHIFT, issued_index = ISSUED_INDEX(word);     \
		__u64 *issued = bpf_map_lookup_elem(&issued_##parity, &issued_index);                                  \
		__u64 *dirty = bpf_map_lookup_elem(&dirty_##parity, &index);                                           \
		__u64 *hole = bpf_map_lookup_elem(&holes, &index);                                                     \
		__u64 *summary = bpf_map_lookup_elem(&summary_##parity, &summary_index);                               \
		__u64 group = 1ULL << ((word >> SUMMARY_GROUP_SHIFT) & 63);                                            \
		__u64 issued_seen, dirty_seen, hole_seen, summary_seen;                                                \
		if (!issued || !dirty || !hole || !summary)                                                            \
			return 0;                                                                                      \
		issued_seen = MARKS_ISSUED(issue) ? SEEN(issued) : 0;                                                  \
		dirty_seen = SEEN(dirty);                                                                              \
		hole_seen = SEEN(hole);                                                                                \
		summary_seen = SEEN(summary);                                                                          \
		clear_bits(hole, hole_seen, mask);                                                                     \
		if (MARKS_DIRTY(issue)) {                                                                              \
			set_bits(dirty, dirty_seen, mask);                                                             \
			set_bits(summary, summary_seen, group);                                                        \
		}                                                                                                      \
		if (MARKS_ISSUED(issue))                                                                               \
			set_bits(issued, issued_seen, mask);                                                           \
		return 1;                                                                                              \
	}
MARK_IN(0)
MARK_IN(1)

static __always_inline int mark_word(__u64 word, __u64 mask, __u32 parities, __u32 issue)
{
	int well = 1;

	if (parities & 1)
		well &= mark_in_0(word, mask, issue);
	if (parities & 2)
		well &= mark_in_1(word, mask, issue);
	return well;
}

static long mark_step(__u32 step, struct span *span)
{
	__u64 first = span->first_block >> 6, last = span->last_block >> 6;
	__u64 word = first + step;
	__u64 mask = ~0ULL;

	if (word == first)
		mask &= ~0ULL << (span->first_block & 63);
	if (word == last)
		mask &= ~0ULL >> (63 - (span->last_block & 63));
	if (!mark_word(span->word_base + word, mask, span->parities, span->issue))
		span->lost = 1;
	return 0;
}

// Clips in sectors, subtracts the window's start, then divides, rounding outward. Most writes are within one word: they
// are marked straight, without a loop.
static __always_inline int mark_window(__u32 index, struct range *range)
{
	struct volume *volume = bpf_map_lookup_elem(&volumes, &index);
	__u64 from = range->sector, to = range->sector + range->sectors;
	__u64 first, last, end;

	if (!volume)
		return 0;
	end = volume->start + volume->sectors;
	from = from > volume->start ? from : volume->start;
	to = to < end ? to : end;
	if (from >= to)
		return 1;
	first = (from - volume->start) >> (volume->bit_shift & 63);
	last = (to - volume->start - 1) >> (volume->bit_shift & 63);
	if (last >= volume->bits)
		return 0;
	if (first >> 6 == last >> 6) {
		__u64 mask = ~0ULL << (first & 63) & ~0ULL >> (63 - (last & 63));

		return mark_word(volume->word_base + (first >> 6), mask, range->parities, range->issue);
	}
	struct span span = {
		.first_block = first,
		.last_block = last,
		.word_base = volume->word_base,
		.parities = range->parities,
		.issue = range->issue,
	};
	return bpf_loop((last >> 6) - (first >> 6) + 1, mark_step, &span, 0) >= 0 && !span.lost;
}

static long window_step(__u32 step, struct range *range)
{
	if (!mark_window(range->first_volume + step, range))
		range->lost = 1;
	return 0;
}

// Straight where the disk has one window, which is the rule.
static __always_inline void mark_range(struct range *range)
{
	if (range->volumes == 1)
		window_step(0, range);
	else if (bpf_loop(range->volumes, window_step, range, 0) < 0)
		range->lost = 1;
}

#include "discards.h"

// Merged discards hold bios that are not contiguous: each has its own range.
static long mark_bio(__u32 step, struct range *range)
{
	struct bio *bio = (struct bio *)range->next_bio;

	if (!bio)
		return 1;
	range->sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
	range->sectors = (BPF_CORE_READ(bio, bi_iter.bi_size) + 511) >> 9;
	range->next_bio = (__u64)BPF_CORE_READ(bio, bi_next);
	mark_range(range);
	end_discard(range);
	return 0;
}

#ifdef SABOTAGE_HOLD
static long wait_step(__u32 step, __u64 *until)
{
	return bpf_ktime_get_ns() >= *until;
}
#endif

// Counts the run in and gives the parity to mark, as a bit; both, where `active` would not hold still.
static __always_inline __u32 enter(struct gate *gate, struct control *control)
{
	for (int attempt = 0; attempt < 4; attempt++) {
		__u32 parity = *(volatile __u64 *)&control->active & 1;

		CONSUME(__sync_fetch_and_add(&gate->entries[parity], 1));
		if ((*(volatile __u64 *)&control->active & 1) == parity)
			return 1 << parity;
		CONSUME(__sync_fetch_and_add(&gate->exits[parity], 1));
	}
	CONSUME(__sync_fetch_and_add(&gate->entries[0], 1));
	CONSUME(__sync_fetch_and_add(&gate->entries[1], 1));
	return 3;
}

// For tests of the barrier: one run in 64 is held up for half a millisecond between its entry and its marks.
static __always_inline void hold_up(void)
{
#ifdef SABOTAGE_HOLD
	__u64 until = bpf_ktime_get_ns() + 500000;

	if (bpf_get_prandom_u32() % 64 == 0)
		bpf_loop(1 << 20, wait_step, &until, 0);
#endif
}

static __always_inline void leave(struct gate *gate, __u32 parities)
{
	if (parities & 1)
		CONSUME(__sync_fetch_and_add(&gate->exits[0], 1));
	if (parities & 2)
		CONSUME(__sync_fetch_and_add(&gate->exits[1], 1));
}

// Every operation whose number is odd moves data to the device: WRITE, DISCARD, SECURE_ERASE, WRITE_ZEROES.
static __always_inline int is_write(unsigned int operation_flags)
{
	return operation_flags & 1;
}

static __always_inline unsigned int operation(unsigned int operation_flags)
{
	return operation_flags & 0xff;
}

// Discards and write-zeroes leave zeros, or are defined to. What SECURE_ERASE leaves is for the device to say.
static __always_inline int makes_holes(unsigned int op)
{
	return op == OPERATION_DISCARD || op == OPERATION_WRITE_ZEROES;
}

static __always_inline struct disk *disk_of(struct gendisk *gendisk, __u32 *dev)
{
	*dev = gendisk->part0->bd_dev;
	return bpf_map_lookup_elem(&disks, dev);
}

// A request to a native NVMe multipath disk completes on the queue of a path, a hidden disk that is not in `disks`: it is
// known by its name, and stands for its head (drivers/nvme/host/multipath.c).
static __always_inline struct disk *head_of(struct gendisk *path, __u32 *dev)
{
	char name[DISK_NAME_BYTES] = {};
	__u32 zero = 0, *head;
	struct control *switches = bpf_map_lookup_elem(&control, &zero);

	if (!switches || !switches->paths || BPF_CORE_READ_STR_INTO(&name, path, disk_name) < 0)
		return 0;
	head = bpf_map_lookup_elem(&paths, name);
	if (!head)
		return 0;
	*dev = *head;
	return bpf_map_lookup_elem(&disks, head);
}

static __always_inline struct tally *tally_of(struct disk *disk, __u32 cpu)
{
	__u32 index = cpu * VOLUMES_MAX + disk->index;

	return bpf_map_lookup_elem(&tallies, &index);
}

static __always_inline void count_completed(struct tally *tally, unsigned int op, __u64 sectors)
{
	if (!tally)
		return;
	if (op == OPERATION_WRITE)
		tally->written += sectors;
	else if (op == OPERATION_DISCARD)
		tally->discarded += sectors;
	else
		tally->zeroed += sectors;
	tally->completed_events++;
}

// For tests of the sums: of every thousand completions one is not seen. The first ones are: what a driver leaves out hides a
// loss until it was seen once.
static __always_inline int is_dropped(struct tally *tally)
{
#ifdef SABOTAGE_DROP
	return tally && tally->completed_events >= 256 && bpf_get_prandom_u32() % 1000 == 0;
#else
	return 0;
#endif
}

// Keeps what the bio was issued for until it completes.
static __always_inline void remember(struct gate *gate, struct bio *bio, struct range *range, unsigned int op)
{
	struct bio_range kept = {.sector = range->sector, .sectors = range->sectors, .dev = range->dev, .operation = op};
	__u64 key = (__u64)bio;

	if (bpf_map_update_elem(&ranges, &key, &kept, BPF_ANY) < 0)
		count(&gate->unremembered);
}

static __always_inline int issue_to(struct bio *bio, __u64 sector, int remapped)
{
	unsigned int op = operation(bio->bi_opf);
	struct range range = {.issue = 1};
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	struct control *switches;
	struct tally *tally;
	struct disk *disk;
	struct gate *gate;

	disk = disk_of(bio->bi_bdev->bd_disk, &range.dev);
	if (!disk)
		return 0;
	switches = bpf_map_lookup_elem(&control, &zero);
	gate = bpf_map_lookup_elem(&gates, &cpu);
	if (!switches || !gate)
		return 0;
	range.sector = sector;
	range.sectors = ((__u64)bio->bi_iter.bi_size + 511) >> 9;
	range.first_volume = disk->first_volume;
	range.volumes = disk->volumes;
	range.parities = enter(gate, switches);
	hold_up();
	if (!makes_holes(op))
		touch_discards(&range, switches);
	mark_range(&range);
	if (makes_holes(op) && !remapped)
		begin_discard(&range);
	if (disk->bio_based) {
		// A bio that is on its way through two tracked disks has one place only.
		__u64 key = (__u64)bio;
		struct bio_range *kept = remapped ? bpf_map_lookup_elem(&ranges, &key) : 0;

		if (kept && kept->dev != range.dev)
			count(&gate->unremembered);
		else
			remember(gate, bio, &range, op);
	}
	tally = tally_of(disk, cpu);
	if (tally && remapped) {
		tally->remapped += range.sectors;
	} else if (tally) {
		tally->issued += range.sectors;
		tally->issued_events++;
	}
	if (range.lost)
		count(&gate->lost);
	leave(gate, range.parities);
	return 0;
}

SEC("tp_btf/block_bio_queue")
int BPF_PROG(issue, struct bio *bio)
{
	if (!is_write(bio->bi_opf) || !bio->bi_iter.bi_size)
		return 0;
	return issue_to(bio, bio->bi_iter.bi_sector, 0);
}

// A bio that is sent on to another disk as it is. `dev` is where it comes from; a partition's bio comes from where it is.
SEC("tp_btf/block_bio_remap")
int BPF_PROG(remap, struct bio *bio, __u32 dev, sector_t from)
{
	if (!is_write(bio->bi_opf) || !bio->bi_iter.bi_size || dev == bio->bi_bdev->bd_dev)
		return 0;
	return issue_to(bio, bio->bi_iter.bi_sector + bio->bi_bdev->bd_start_sect, 1);
}

// The request's queue names the disk.
SEC("tp_btf/block_rq_complete")
int BPF_PROG(complete, struct request *rq, int error, unsigned int bytes)
{
	struct range range = {};
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	unsigned int op = operation(rq->cmd_flags);
	struct control *switches;
	struct disk *disk;
	struct gate *gate;

	if (!is_write(op) || (!bytes && op != OPERATION_PASSTHROUGH_OUT))
		return 0;
	disk = disk_of(rq->q->disk, &range.dev);
	if (!disk)
		disk = head_of(rq->q->disk, &range.dev);
	if (!disk || disk->bio_based)
		return 0;
	switches = bpf_map_lookup_elem(&control, &zero);
	gate = bpf_map_lookup_elem(&gates, &cpu);
	if (!switches || !gate)
		return 0;
	if (op == OPERATION_PASSTHROUGH_OUT) {
		count(&gate->blind);
		return 0;
	}
	if (is_dropped(tally_of(disk, cpu)))
		return 0;
	range.first_volume = disk->first_volume;
	range.volumes = disk->volumes;
	range.parities = enter(gate, switches);
	hold_up();
	if (op == OPERATION_WRITE) {
		range.sector = rq->__sector;
		range.sectors = ((__u64)bytes + 511) >> 9;
		touch_discards(&range, switches);
		mark_range(&range);
	} else {
		// A part of a request completes its first bios; which ones is not worth finding out.
		range.hole = makes_holes(op) && !error && bytes >= rq->__data_len;
		range.next_bio = (__u64)rq->bio;
		if (bpf_loop(BIOS_MAX, mark_bio, &range, 0) < 0 || range.next_bio)
			range.lost = 1;
	}
	count_completed(tally_of(disk, cpu), op, bytes >> 9);
	if (range.lost)
		count(&gate->lost);
	leave(gate, range.parities);
	return 0;
}

// A bio of a request-based disk ends here only if it was given back before it became a request, all of it or what was left
// of it (REQ_NOWAIT on a full queue): its marks stay, and it is not waited for.
static __always_inline void take_back(struct tally *tally, struct bio *bio)
{
	if (tally)
		tally->given_back += ((__u64)bio->bi_iter.bi_size + 511) >> 9;
}

SEC("tp_btf/block_bio_complete")
int BPF_PROG(bio_complete, struct request_queue *queue, struct bio *bio)
{
	struct range range = {};
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	struct bio_range *kept, was;
	__u64 key = (__u64)bio;
	struct control *switches;
	struct disk *disk;
	struct gate *gate;

#ifdef SABOTAGE_REFUSED
	// No pointer: the verifier does not let it be read.
	return *(volatile int *)bpf_ktime_get_ns();
#endif
	if (!is_write(bio->bi_opf))
		return 0;
	kept = bpf_map_lookup_elem(&ranges, &key);
	switches = bpf_map_lookup_elem(&control, &zero);
	gate = bpf_map_lookup_elem(&gates, &cpu);
	if (!switches || !gate)
		return 0;
	if (!kept) {
		disk = disk_of(bio->bi_bdev->bd_disk, &range.dev);
		// Clones are parts of a bio that is yet to end, and flushes without data have no range.
		if (!disk || bio->bi_flags & 1 << BIO_CLONED ||
		    (!bio->bi_iter.bi_size && bio->bi_opf & FLAG_PREFLUSH))
			return 0;
		if (disk->bio_based)
			count(&gate->unknown);
		else if (bio->bi_status)
			take_back(tally_of(disk, cpu), bio);
		return 0;
	}
	was = *kept;
	bpf_map_delete_elem(&ranges, &key);
	disk = bpf_map_lookup_elem(&disks, &was.dev);
	if (!disk)
		return 0;
	if (is_dropped(tally_of(disk, cpu)))
		return 0;
	range.dev = was.dev;
	range.sector = was.sector;
	range.sectors = was.sectors;
	range.first_volume = disk->first_volume;
	range.volumes = disk->volumes;
	range.hole = makes_holes(was.operation) && !bio->bi_status;
	range.parities = enter(gate, switches);
	hold_up();
	if (!makes_holes(was.operation))
		touch_discards(&range, switches);
	mark_range(&range);
	if (makes_holes(was.operation))
		end_discard(&range);
	count_completed(tally_of(disk, cpu), was.operation, was.sectors);
	if (range.lost)
		count(&gate->lost);
	leave(gate, range.parities);
	return 0;
}

// Some helpers used here are for GPL-compatible programs only.
char LICENSE[] SEC("license") = "GPL";
