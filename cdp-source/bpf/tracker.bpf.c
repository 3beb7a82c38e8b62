// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Marks which 4 KiB blocks of the tracked volumes are written.
//
// Owns: the marking of issued and completed writes in the pinned maps described in docs/format/tracker-maps.md.
// Invariant: a mark is made before `exits` counts the run that makes it, and a run counts itself in `entries` before
// it looks which parity is active. Whoever flips `active`, and then sees all exits and all entries of the old parity
// agree, holds every mark made in it.
// Does not: know bio-based devices (block_bio_complete), holes, or trust sums over them. Those are separate programs
// and maps, to stand beside these.
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
	__u32 bd_dev;
	struct gendisk *bd_disk;
};
struct gendisk {
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
	struct bvec_iter bi_iter;
};
struct request_queue {
	struct gendisk *disk;
};
struct request {
	struct request_queue *q;
	unsigned int cmd_flags;
	sector_t __sector;
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

// Sets the bits of `mask`, unless all are set: nobody clears them while this run is counted in.
static __always_inline int set_bits(__u64 *word, __u64 mask)
{
	if (!word)
		return 0;
	if ((*(volatile __u64 *)word & mask) != mask)
		CONSUME(__sync_fetch_and_or(word, mask));
	return 1;
}

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

#define MARK_IN(parity)                                                                                                \
	static __always_inline int mark_in_##parity(__u64 word, __u64 mask, __u32 issue)                               \
	{                                                                                                              \
		__u32 dirty_index = word;                                                                              \
		__u32 summary_index = word >> SUMMARY_SPAN_SHIFT;                                                      \
		__u32 issued_index = ISSUED_INDEX(word);                                                               \
		int well = 1;                                                                                          \
		if (MARKS_DIRTY(issue)) {                                                                              \
			well &= set_bits(bpf_map_lookup_elem(&dirty_##parity, &dirty_index), mask);                    \
			well &= set_bits(bpf_map_lookup_elem(&summary_##parity, &summary_index),                       \
					 1ULL << ((word >> SUMMARY_GROUP_SHIFT) & 63));                                \
		}                                                                                                      \
		if (MARKS_ISSUED(issue))                                                                               \
			well &= set_bits(bpf_map_lookup_elem(&issued_##parity, &issued_index), mask);                  \
		return well;                                                                                           \
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
	first = (from - volume->start) / BLOCK_SECTORS;
	last = (to - volume->start - 1) / BLOCK_SECTORS;
	if (last >= volume->blocks)
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

// For tests of the barrier: one issue in 64 is held up for half a millisecond between its entry and its marks.
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

static __always_inline struct disk *disk_of(struct gendisk *gendisk)
{
	__u32 dev = gendisk->part0->bd_dev;

	return bpf_map_lookup_elem(&disks, &dev);
}

static __always_inline struct tally *tally_of(struct disk *disk, __u32 cpu)
{
	__u32 index = cpu * VOLUMES_MAX + disk->index;

	return bpf_map_lookup_elem(&tallies, &index);
}

SEC("tp_btf/block_bio_queue")
int BPF_PROG(issue, struct bio *bio)
{
	struct range range = {.issue = 1};
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	struct control *switches;
	struct tally *tally;
	struct disk *disk;
	struct gate *gate;

	if (!is_write(bio->bi_opf) || !bio->bi_iter.bi_size)
		return 0;
	disk = disk_of(bio->bi_bdev->bd_disk);
	switches = bpf_map_lookup_elem(&control, &zero);
	gate = bpf_map_lookup_elem(&gates, &cpu);
	if (!disk || !switches || !gate)
		return 0;
	range.sector = bio->bi_iter.bi_sector;
	range.sectors = (bio->bi_iter.bi_size + 511) >> 9;
	range.first_volume = disk->first_volume;
	range.volumes = disk->volumes;
	range.parities = enter(gate, switches);
	hold_up();
	mark_range(&range);
	tally = tally_of(disk, cpu);
	if (tally) {
		tally->issued += range.sectors;
		tally->issued_events++;
	}
	if (range.lost)
		count(&gate->lost);
	leave(gate, range.parities);
	return 0;
}

// The request's queue names the disk: a path of a multipath device completes on a queue of its own.
SEC("tp_btf/block_rq_complete")
int BPF_PROG(complete, struct request *rq, int error, unsigned int bytes)
{
	struct range range = {};
	__u32 zero = 0, cpu = bpf_get_smp_processor_id();
	unsigned int op = operation(rq->cmd_flags);
	struct control *switches;
	struct tally *tally;
	struct disk *disk;
	struct gate *gate;

	if (!is_write(op) || (!bytes && op != OPERATION_PASSTHROUGH_OUT))
		return 0;
	disk = disk_of(rq->q->disk);
	switches = bpf_map_lookup_elem(&control, &zero);
	gate = bpf_map_lookup_elem(&gates, &cpu);
	if (!disk || !switches || !gate)
		return 0;
	if (op == OPERATION_PASSTHROUGH_OUT) {
		count(&gate->blind);
		return 0;
	}
#ifdef SABOTAGE_DROP
	if (bpf_get_prandom_u32() % 1000 == 0)
		return 0;
#endif
	range.first_volume = disk->first_volume;
	range.volumes = disk->volumes;
	range.parities = enter(gate, switches);
	if (op == OPERATION_WRITE) {
		range.sector = rq->__sector;
		range.sectors = ((__u64)bytes + 511) >> 9;
		mark_range(&range);
	} else {
		range.next_bio = (__u64)rq->bio;
		if (bpf_loop(BIOS_MAX, mark_bio, &range, 0) < 0 || range.next_bio)
			range.lost = 1;
	}
	tally = tally_of(disk, cpu);
	if (tally) {
		if (op == OPERATION_WRITE)
			tally->written += bytes >> 9;
		else if (op == OPERATION_DISCARD)
			tally->discarded += bytes >> 9;
		else
			tally->zeroed += bytes >> 9;
		tally->completed_events++;
	}
	if (range.lost)
		count(&gate->lost);
	leave(gate, range.parities);
	return 0;
}

// Some helpers used here are for GPL-compatible programs only.
char LICENSE[] SEC("license") = "GPL";
