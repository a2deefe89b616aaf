package cow

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
)

// syncs is a sync that tells when it begins and waits for what it has to return.
type syncs struct {
	began chan int   // number of the one that began
	end   chan error // what it returns
	count atomic.Int32
}

func newSyncs() *syncs {
	return &syncs{began: make(chan int, 100), end: make(chan error)}
}

func (s *syncs) sync(bool) error {
	s.began <- int(s.count.Add(1))
	return <-s.end
}

func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSyncs()
		f := newFlusher(s.sync)
		for k := 1; k <= 3; k++ {
			flush := begin(func() error { return f.flush(false) })
			waitsOn(t, flush, "a flush whose sync runs")
			if got := <-s.began; got != k {
				t.Errorf("flush %d: sync %d began", k, got)
			}
			s.end <- nil
			ends(t, flush, "a flush whose sync ended")
		}
	})
}

// TestFlushForMany checks that all who ask while a sync runs share the next one,
// and are not content with that which began before they asked.
func TestFlushForMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const many = 20
		s := newSyncs()
		f := newFlusher(s.sync)
		first := begin(func() error { return f.flush(false) })
		<-s.began
		var flushes []chan error
		for range many {
			flushes = append(flushes, begin(func() error { return f.flush(false) }))
		}
		for _, flush := range flushes {
			waitsOn(t, flush, "a flush that came while a sync ran")
		}
		s.end <- nil
		ends(t, first, "the first flush")
		for _, flush := range flushes {
			waitsOn(t, flush, "a flush whose sync runs")
		}
		<-s.began
		s.end <- nil
		for _, flush := range flushes {
			ends(t, flush, "a flush whose sync ended")
		}
		if got := s.count.Load(); got != 2 {
			t.Errorf("%d flushes took %d syncs, want 2", many+1, got)
		}
	})
}

// TestFlushFailsForEver checks that nobody is told of success after a failure:
// neither those who waited for the sync that failed, nor those for the next, nor who
// comes later. Those whose sync was over before are not told of it.
func TestFlushFailsForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSyncs()
		f := newFlusher(s.sync)
		before := begin(func() error { return f.flush(false) })
		<-s.began
		during := begin(func() error { return f.flush(false) }) // is covered by the second sync, which fails
		waitsOn(t, during, "a flush that came while a sync ran")
		s.end <- nil
		ends(t, before, "a flush that succeeded before another failed")
		<-s.began
		next := begin(func() error { return f.flush(false) }) // would be covered by the third
		waitsOn(t, next, "a flush that came while the sync that fails ran")
		s.end <- syscall.EIO
		synctest.Wait()
		for what, flush := range map[string]chan error{
			"a flush whose sync failed":                 during,
			"a flush that waited for the next sync":     next,
			"a flush that came after a sync had failed": begin(func() error { return f.flush(false) }),
		} {
			if err := <-flush; !errors.Is(err, syscall.EIO) {
				t.Errorf("%s: got %v, want EIO", what, err)
			}
		}
		if got := s.count.Load(); got != 2 {
			t.Errorf("%d syncs ran, want 2: the kernel would call the third a success", got)
		}
	})
}

// TestFlushCoversWhatWasWritten has writers that count what they wrote before they
// flush, and a sync that makes durable what was written when it began.
func TestFlushCoversWhatWasWritten(t *testing.T) {
	rng := newRand(t)
	var written, durable atomic.Int64
	var syncing atomic.Int32
	pauses := rand.New(rand.NewPCG(rng.Uint64(), 0)) // of the syncs alone, one at a time
	f := newFlusher(func(bool) error {
		if syncing.Add(1) != 1 {
			t.Error("two syncs run at once: one would take the other's report of a failure")
		}
		n := written.Load()
		for range pauses.IntN(3000) {
			_ = durable.Load()
		}
		durable.Store(n)
		syncing.Add(-1)
		return nil
	})
	var writers sync.WaitGroup
	for range 8 {
		r := rand.New(rand.NewPCG(rng.Uint64(), 0))
		writers.Go(func() {
			for range 300 {
				mine := written.Add(1)
				for range r.IntN(200) {
					_ = written.Load()
				}
				if err := f.flush(false); err != nil {
					t.Error(err)
				}
				if got := durable.Load(); got < mine {
					t.Errorf("flushed, but only %d of %d writes are durable", got, mine)
					return
				}
			}
		})
	}
	writers.Wait()
}

// TestDeviceFlush checks what a device makes of a failed flush: it is failed and
// says so once, later flushes and FUA writes fail, and the origin still takes writes.
func TestDeviceFlush(t *testing.T) {
	r := newRig(t, 1, 1<<20, 1<<20)
	d, k := r.devs[0], r.disks[0]
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	k.hook(func(op string, off, n int64) error {
		if op == "sync" {
			return errIO
		}
		return nil
	})
	if err := d.Flush(); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "d0") {
		t.Errorf("flush: got %v, want EIO and the device's name", err)
	}
	k.hook(nil)
	for what, err := range map[string]error{
		"flush":             d.Flush(),
		"FUA write":         d.Write([]byte{1}, 0, true),
		"FUA zeroes":        d.WriteZeroes(4096, 4096, zeroFlags{FUA: true}),
		"FUA trim":          d.Trim(8192, 4096, true),
		"FUA write of none": d.Write(nil, 0, true),
	} {
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("%s after a flush failed: got %v, want EIO", what, err)
		}
	}
	if err := d.Write([]byte{2}, 0, false); err != nil {
		t.Errorf("a write after a flush failed: %v", err)
	}
	want(t, d, 2, 0, 1)
	if got := d.State(); !strings.HasPrefix(got, "failed: flush") {
		t.Errorf("state: got %q, want failed: flush and why", got)
	}
	events := 0
	r.mu.Lock()
	for _, e := range r.events {
		if e.Kind == EventDeviceFailed {
			events++
		}
	}
	r.mu.Unlock()
	if events != 1 {
		t.Errorf("events of the failure: got %d, want 1", events)
	}
	r.take("s") // a snapshot can still be taken: it may be the last chance
}
