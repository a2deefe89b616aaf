// Flushing an origin: one fsync for all who wait, and never a success after a
// failure.
//
// The kernel reports a failed write-back once for each open file, to whichever
// fsync comes first; what could not be written is dropped. So one fsync runs at
// a time, its result counts for all who asked before it began, and after a
// failure there is no other result any more. FUA writes take the same way:
// fsync of a range alone would take the report away from a flush.

package cow

import "sync"

// flusher runs sync for many callers.
type flusher struct {
	sync func(complete bool) error

	mu       sync.Mutex
	cond     *sync.Cond
	running  bool
	complete bool   // the next sync is to be complete
	begun    uint64 // number of the last sync that began
	ended    uint64 // number of the last sync that ended
	err      error  // of the first sync that failed
}

func newFlusher(fsync func(complete bool) error) *flusher {
	f := &flusher{sync: fsync}
	f.cond = sync.NewCond(&f.mu)
	return f
}

// flush returns nil when a sync that began after the call has succeeded, and an
// error if any sync ever failed. With complete set it was one of times and attributes,
// too.
func (f *flusher) flush(complete bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.complete = f.complete || complete
	for covering := f.begun + 1; f.ended < covering && f.err == nil; {
		if f.running {
			f.cond.Wait()
			continue
		}
		f.running = true
		f.begun++
		complete := f.complete
		f.complete = false
		f.mu.Unlock()
		err := f.sync(complete)
		f.mu.Lock()
		f.running = false
		f.ended = f.begun
		if err != nil {
			f.err = err
		}
		f.cond.Broadcast()
	}
	return f.err
}
