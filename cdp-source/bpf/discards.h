// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
//
// Holes: discards and write-zeroes on their way, and the bits they leave. A part of tracker.bpf.c.
//
// `holes` has a bit where the last mark was the successful completion of one. A write that is
// in flight together with a discard may land before or after it, and its completion run may come before or after the
// discard's, so the bit may be set only if no such write was seen: a discard on its way has an entry in `discards`, and
// every other write says there, first, that it touched it, and clears the bit then; the discard's completion sets the
// bits first, and looks then whether it was touched. Each of these is a full barrier, so either the discard sees the touch and takes its
// bits back, or the write clears the bits after they were set. A write that is submitted before the discard's completion and
// completes after it clears the bit when it does; in between it is in flight, and zeros are what was there without it.

// Bits of blocks wholly inside the range are set in `holes`, or taken back. A volume's last block may be a part of one.
static long hole_step(__u32 step, struct span *span)
{
	__u64 first = span->first_block >> 6, last = span->last_block >> 6;
	__u64 word = first + step;
	__u32 index = span->word_base + word;
	__u64 mask = ~0ULL;

	if (word == first)
		mask &= ~0ULL << (span->first_block & 63);
	if (word == last)
		mask &= ~0ULL >> (63 - (span->last_block & 63));
	__u64 *hole = bpf_map_lookup_elem(&holes, &index);

	if (!hole)
		return 1;
	if (span->issue)
		clear_bits(hole, SEEN(hole), mask);
	else
		set_bits(hole, SEEN(hole), mask);
	return 0;
}

static long hole_window(__u32 step, struct range *range)
{
	__u32 index = range->first_volume + step;
	struct volume *volume = bpf_map_lookup_elem(&volumes, &index);
	__u64 from = range->sector, to = range->sector + range->sectors;
	struct span span = {.issue = range->takes_holes_back};
	__u64 end, round;

	if (!volume)
		return 1;
	end = volume->start + volume->sectors;
	round = (1ULL << (volume->bit_shift & 63)) - 1;
	from = from > volume->start ? from : volume->start;
	if (from >= end || to <= volume->start)
		return 0;
	to = to < end ? to : end + round;
	span.first_block = (from - volume->start + round) >> (volume->bit_shift & 63);
	span.last_block = (to - volume->start) >> (volume->bit_shift & 63);
	if (span.first_block >= span.last_block || span.last_block > volume->bits)
		return 0;
	span.last_block--;
	span.word_base = volume->word_base;
	bpf_loop((span.last_block >> 6) - (span.first_block >> 6) + 1, hole_step, &span, 0);
	return 0;
}

// What a run finds among the discards on their way.
struct search {
	__u64 start;
	__u64 end;
	__u64 dev;
	__u32 contained;
	__u32 touched;
	__u64 completed; // sectors, to be taken off the entries that contain the range
};

static __always_inline int is_live(struct discard *discard)
{
	__u64 left = *(volatile __u64 *)&discard->left;

	return left && left != RESERVED;
}

// Another write tells the discards that it overlaps.
static long touch_step(__u32 index, struct search *search)
{
	struct discard *discard = bpf_map_lookup_elem(&discards, &index);

	if (!discard)
		return 1;
	if (is_live(discard) && discard->dev == search->dev && discard->start < search->end &&
	    discard->end > search->start)
		CONSUME(__sync_fetch_and_or(&discard->touched, 1));
	return 0;
}

static long find_step(__u32 index, struct search *search)
{
	struct discard *discard = bpf_map_lookup_elem(&discards, &index);

	if (!discard)
		return 1;
	if (is_live(discard) && discard->dev == search->dev && discard->start <= search->start &&
	    discard->end >= search->end) {
		search->contained = 1;
		if (*(volatile __u64 *)&discard->touched)
			search->touched = 1;
	}
	return 0;
}

// Takes what has completed off the first entry that contains it and has that much left, and frees it when none is left.
static long release_step(__u32 index, struct search *search)
{
	struct discard *discard = bpf_map_lookup_elem(&discards, &index);
	__u32 zero = 0;
	struct control *switches = bpf_map_lookup_elem(&control, &zero);
	__u64 left;

	if (!discard || !switches)
		return 1;
	if (!is_live(discard) || discard->dev != search->dev || discard->start > search->start ||
	    discard->end < search->end)
		return 0;
	left = *(volatile __u64 *)&discard->left;
	for (int attempt = 0; attempt < 8; attempt++) {
		__u64 found;

		if (left == RESERVED || left < search->completed)
			return 0;
		found = __sync_val_compare_and_swap(&discard->left, left, left - search->completed);
		if (found == left) {
			if (left == search->completed)
				CONSUME(__sync_fetch_and_add(&switches->discards, -1));
			return 1;
		}
		left = found;
	}
	return 0;
}

static long reserve_step(__u32 index, struct search *search)
{
	struct discard *discard = bpf_map_lookup_elem(&discards, &index);
	__u32 zero = 0;
	struct control *switches = bpf_map_lookup_elem(&control, &zero);

	if (!discard || !switches)
		return 1;
	if (__sync_val_compare_and_swap(&discard->left, 0, RESERVED) != 0)
		return 0;
	discard->start = search->start;
	discard->end = search->end;
	discard->dev = search->dev;
	discard->touched = 0;
	CONSUME(__sync_fetch_and_add(&switches->discards, 1));
	CONSUME(__sync_lock_test_and_set(&discard->left, search->end - search->start));
	return 1;
}

static __always_inline struct search search_for(struct range *range)
{
	struct search search = {
		.start = range->sector,
		.end = range->sector + range->sectors,
		.dev = range->dev,
		.completed = range->sectors,
	};

	return search;
}

// A discard is issued: from here on it is told who touches it. Without a free entry it makes no holes.
static __always_inline void begin_discard(struct range *range)
{
	struct search search = search_for(range);

	bpf_loop(DISCARDS_MAX, reserve_step, &search, 0);
}

// A write that is no discard tells those on their way, before it is marked.
static __always_inline void touch_discards(struct range *range, struct control *switches)
{
	if (*(volatile __u64 *)&switches->discards) {
		struct search search = search_for(range);

		bpf_loop(DISCARDS_MAX, touch_step, &search, 0);
	}
}

// A discard, or a part of one, has completed; it is marked already.
static __always_inline void end_discard(struct range *range)
{
	struct search search = search_for(range);

	bpf_loop(DISCARDS_MAX, find_step, &search, 0);
	if (range->hole && search.contained && !search.touched) {
		range->takes_holes_back = 0;
		bpf_loop(range->volumes, hole_window, range, 0);
		bpf_loop(DISCARDS_MAX, find_step, &search, 0);
		if (search.touched) {
			range->takes_holes_back = 1;
			bpf_loop(range->volumes, hole_window, range, 0);
		}
	}
	bpf_loop(DISCARDS_MAX, release_step, &search, 0);
}
