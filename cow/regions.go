// The record of regions: which parts of an origin may have been written since the
// last checkpoint.
//
// After a loss of power nobody knows which writes reached the disk. So before the
// first write to a region of 64 MiB, the region is recorded as active, durably;
// a start after a loss of power counts all recorded regions as changed. To keep the
// record small, a checkpoint (checkpoint.go) drops what was idle meanwhile:
//
//	begin   activity starts anew, the record stays
//	        (writes in flight end; the origin is synced, the map written down)
//	drop    the record becomes what was active since begin
//
// A region that goes on being written stays in the record and costs its writers
// nothing but a look. What is dropped was synced, and is in the map that was
// written down.

package cow

import (
	"cmp"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// regionShift makes regions of 64 MiB.
const regionShift = 26

// regions is the record of one device.
type regions struct {
	file durableFile
	n    int64 // regions

	// recorded are the regions that are durably recorded, active those that were
	// written since begin. A bit for each.
	recorded, active []atomic.Uint64

	// dropping serializes drops. Held while writes in flight end, and across I/O.
	dropping sync.Mutex

	// mu serializes writing the file; held across I/O. Writers wait for it, so it is never
	// held while anything waits for writers.
	mu     sync.Mutex
	state  regionsState
	going  []uint64 // regions that a drop is taking out of recorded, nil while none does
	halved bool     // one of the headers was found damaged (heal)
	unsure error    // why it is not known which header, and so which set, counts on the disk

	// joinMu protects the batch that the next write of the file takes along.
	joinMu sync.Mutex
	next   *regionsBatch
}

// regionsBatch are regions that are recorded together.
type regionsBatch struct {
	regions []int64
	done    chan struct{}
	err     error
}

func regionsOf(size int64) int64 { return (size + 1<<regionShift - 1) >> regionShift }

func newRegions(f durableFile, size int64) *regions {
	n := regionsOf(size)
	words := (n + 63) / 64
	return &regions{file: f, n: n, recorded: make([]atomic.Uint64, words), active: make([]atomic.Uint64, words)}
}

func setBit(b []atomic.Uint64, i int64) {
	if w := &b[i/64]; w.Load()>>(i%64)&1 == 0 {
		w.Or(1 << (i % 64))
	}
}

func hasBit(b []atomic.Uint64, i int64) bool { return b[i/64].Load()>>(i%64)&1 != 0 }

// span is which regions [off, off+n) touches: [from, to). Beyond the end there are
// none.
func (r *regions) span(off, n int64) (from, to int64) {
	return off >> regionShift, min(r.n, (off+n-1)>>regionShift+1)
}

// note says whether the regions of [off, off+n) are recorded, and counts them as
// active. It takes no lock.
func (r *regions) note(off, n int64) bool {
	for i, to := r.span(off, n); i < to; i++ {
		// First active, then a look: drop does it the other way round.
		setBit(r.active, i)
		if !hasBit(r.recorded, i) {
			return false
		}
	}
	return true
}

// add records the regions of [off, off+n), durably, together with those of all who
// come while the file is being written.
func (r *regions) add(off, n int64) error {
	r.joinMu.Lock()
	b := r.next
	mine := b == nil
	if mine {
		b = &regionsBatch{done: make(chan struct{})}
		r.next = b
	}
	for i, to := r.span(off, n); i < to; i++ {
		b.regions = append(b.regions, i)
	}
	r.joinMu.Unlock()
	if !mine {
		<-b.done
		return b.err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.joinMu.Lock()
	r.next = nil // who comes now is not in the write any more
	r.joinMu.Unlock()
	b.err = r.write(b.regions)
	close(b.done)
	return b.err
}

// write makes regions durable. The caller holds mu.
func (r *regions) write(list []int64) error {
	pages := make(map[int64]bool)
	for _, i := range list {
		if !hasBit(r.recorded, i) {
			pages[i/regionPageBits] = true
		}
	}
	for p := range pages {
		if err := r.writePage(r.state.set, p, list); err != nil {
			return err
		}
	}
	if len(pages) > 0 {
		if err := cmp.Or(r.unsure, r.file.Sync()); err != nil {
			return err
		}
	}
	for _, i := range list {
		setBit(r.recorded, i)
	}
	return nil
}

// reserve sees to it, durably, that no number up to number is given out again
// after a loss of power, and takes some more along.
func (r *regions) reserve(number uint64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if number <= r.state.number {
		return r.unsure
	}
	r.state.number = number + reserveStep - 1
	return r.writeHeader()
}

// extend makes the lease durable until at least t.
func (r *regions) extend(t time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.lease >= t.UnixNano() {
		return r.unsure
	}
	r.state.lease = t.UnixNano()
	return r.writeHeader()
}

// endLease makes the lease end durably at t.
func (r *regions) endLease(t int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state.lease = t
	return r.writeHeader()
}

// begin starts activity anew.
func (r *regions) begin() {
	for i := range r.active {
		r.active[i].Store(0)
	}
}

// drop makes the record, which belongs to generation from then on, what was active
// since begin. turn waits until all who were told by note that their regions are recorded
// have ended their writes; where it returns false, nothing is dropped.
//
// One of these may wait for a snapstore that hangs, so mu is not held meanwhile: a write to
// an idle region would wait for that as well, and end the generation after half of its
// time although the state is sound. What others write to the record then goes to the set
// that counts, so it must still hold what is going (isKept): who was told that it is
// recorded relies on that until the other set counts.
func (r *regions) drop(generation uuid.UUID, turn func() bool) error {
	r.dropping.Lock()
	defer r.dropping.Unlock()
	was := r.narrow()
	ended := turn()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.going = nil
	if !ended {
		r.restore(was)
		return ErrStopping
	}
	// Who looked before has marked its region as active by now. Who came later has
	// added it.
	for i := range r.recorded {
		r.recorded[i].Or(r.active[i].Load() & was[i])
	}
	set := r.state.set ^ 1
	err := r.writeSet(set)
	if err == nil {
		err = r.file.Sync()
	}
	if err == nil {
		r.state.set, r.state.generation = set, generation
		err = r.writeHeader()
	}
	if err != nil {
		r.restore(was) // the old set still counts, or both do
	}
	return err
}

// narrow takes what was not active since begin out of recorded, and returns what that was
// before.
func (r *regions) narrow() (was []uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	was = make([]uint64, len(r.recorded))
	for i := range r.recorded {
		was[i] = r.recorded[i].Load()
		r.recorded[i].And(r.active[i].Load())
	}
	r.going = was
	return was
}

// isKept says whether the set that counts holds a region, whoever is told that it is
// recorded. The caller holds mu.
func (r *regions) isKept(i int64) bool {
	return hasBit(r.recorded, i) || r.going != nil && r.going[i/64]>>(i%64)&1 != 0
}

func (r *regions) restore(was []uint64) {
	for i := range r.recorded {
		r.recorded[i].Or(was[i])
	}
}
