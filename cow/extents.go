// Finding what of an image is data and what is a hole.

package cow

import (
	"fmt"
	"iter"
	"slices"
	"sync"
)

// extents are the data runs of an image as it was at its instant: found when first
// asked for, and kept, because the origin's own holes may drift. What is data for
// one reader must not be a hole for the next.
type extents struct {
	mu    sync.Mutex
	known bool
	data  []dataRun // ascending, with gaps between
	size  int64     // sum of the runs
}

type dataRun struct{ off, end int64 }

// find computes the runs at the first call.
func (e *extents) find(i *Image) ([]dataRun, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.known {
		return e.data, nil
	}
	data, err := i.scan()
	if err != nil {
		return nil, fmt.Errorf("find holes of %s@%s: %w", i.device.name, i.snapshot.name, err)
	}
	e.data, e.known = data, true
	for _, r := range data {
		e.size += r.end - r.off
	}
	return data, nil
}

// scanWindow is how many preserved chunks one look at the tables visits, so that
// nobody waits long for its reader to leave.
var scanWindow = 1 << 14 // smaller in tests

// scan finds the data of the image. For each run it asks the origin first and
// looks at the tables afterwards: a block that was changed since the image's
// instant is in a table before the origin's answer can be wrong about it.
func (i *Image) scan() ([]dataRun, error) {
	var data []dataRun
	add := func(off, end int64) {
		end = min(end, i.Size())
		if n := len(data); n > 0 && data[n-1].end == off {
			data[n-1].end = end
			return
		}
		data = append(data, dataRun{off, end})
	}
	for off := int64(0); off < i.Size(); {
		hole, end, err := i.nextInOrigin(off)
		if err != nil {
			return nil, err
		}
		for off < end {
			if off, err = i.scanRun(off, end, hole, add); err != nil {
				return nil, err
			}
		}
	}
	return slices.Clip(data), i.Err()
}

// nextInOrigin finds the run of data or hole of the origin that begins at off. What
// was cut from the device counts as a hole: the image has all of it in its tables.
func (i *Image) nextInOrigin(off int64) (hole bool, to int64, err error) {
	for {
		end := min(i.size, i.device.Size())
		if off >= end {
			return true, i.size, nil
		}
		hole, to, err = i.device.nextRun(off, end)
		if err == nil || end <= i.device.Size() {
			return hole, to, err
		}
	}
}

// scanRun adds the data in [off, end), which the origin says is all hole or all
// data, and returns where it stopped: at the end, or after scanWindow chunks. Both
// are multiples of a block but for the end of the image, or the origin's file
// system has smaller blocks: then the block counts as data.
func (i *Image) scanRun(off, end int64, hole bool, add func(off, end int64)) (to int64, err error) {
	to = off
	err = i.guarded(func() (err error) {
		to, err = i.scanTables(off, end, hole, add)
		return err
	})
	return to, err
}

func (i *Image) scanTables(off, end int64, hole bool, add func(off, end int64)) (int64, error) {
	g, _ := i.device.readers.tryEnter()
	defer i.device.readers.leave(g)
	if err := i.Err(); err != nil {
		return off, err
	}
	chain := i.chain(nil, nil)
	at := off // everything before was added
	visited := 0
	for c := range preserved(chain, chunkNo(off>>chunkShift), chunks(end)) {
		var places [blocksPerChunk]place
		locate(chain, places[:], c.off(), chunkSize)
		for b, p := range places {
			from, to := max(c.off()+int64(b)<<blockShift, off), min(c.off()+int64(b+1)<<blockShift, end)
			if from >= to || p == inOrigin {
				continue
			}
			if !hole && at < from {
				add(at, from)
			}
			if p != isZero {
				add(from, to)
			}
			at = to
		}
		if visited++; visited == scanWindow {
			end = min(c.off()+chunkSize, end)
			break
		}
	}
	if !hole && at < end {
		add(at, end)
	}
	return end, nil
}

// preserved yields the chunks of [c, end) that any table of the chain has a word
// for, in ascending order. It looks at newer layers first, as locate does.
func preserved(chain []*table, c, end chunkNo) iter.Seq[chunkNo] {
	return func(yield func(chunkNo) bool) {
		for c < end {
			next := end
			for _, t := range slices.Backward(chain) {
				for first := range t.from(c) {
					next = min(next, first)
					break
				}
				if next == c {
					break
				}
			}
			if next >= end || !yield(next) {
				return
			}
			c = next + 1
		}
	}
}
