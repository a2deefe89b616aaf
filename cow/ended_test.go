package cow

import (
	"errors"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestHangingStateTakesOneLimit has a state disk hang when a region is to be recorded,
// and the origin have no place for the note that the generation has ended, or one.
func TestHangingStateTakesOneLimit(t *testing.T) {
	for _, tc := range []struct {
		name  string
		block bool
		want  time.Duration
	}{
		{"noted with the origin", false, 5 * time.Second},
		{"noted nowhere", true, 10 * time.Second},
	} {
		t.Run(tc.name, inBubble(func(t *testing.T) {
			l := newPowerLife(t)
			l.block = tc.block
			l.keep()
			l.take()
			heal := make(chan struct{})
			l.disks.before = func(string) error {
				<-heal
				return errIO
			}
			defer close(heal)
			begun := time.Now()
			l.unkept("hang")
			l.put(3 << regionShift)
			if got := time.Since(begun); got != tc.want {
				t.Errorf("the first write to a region took %v, want %v", got, tc.want)
			}
			begun = time.Now()
			l.put(4 << regionShift)
			if got := time.Since(begun); got != 0 {
				t.Errorf("the next one took %v, want 0", got)
			}
			if !tc.block {
				l.lose(0) // no old generation may be back that does not know of these
			}
		}))
	}
}

// TestHangingStoreEndsNoGeneration has the snapstore hang in one write while idle regions
// are dropped from the record. First writes to other regions, also to one that is being
// dropped, do not wait for that, and the generation goes on.
func TestHangingStoreEndsNoGeneration(t *testing.T) {
	inBubble(func(t *testing.T) {
		l := newPowerLife(t)
		l.hangs = true
		l.keep()
		l.put(0)
		l.put(1 << regionShift)
		l.take()
		written, dropping := make(chan struct{}), make(chan struct{})
		l.disks.before = func(what string) error {
			if what == "rename /state/devices/vda/map.new" {
				close(written)
				<-dropping
			}
			return nil
		}
		checkpoint := begin(l.checkpoint)
		<-written
		entered, release := stop(l.part.hook, "write", 0)
		p := l.data(0, blockSize)
		value := l.value
		l.fact("hanging write", func(f *powerFacts) {
			for s, to := sectorsOf(0, blockSize); s < to; s++ {
				f.now[s] = value
				f.later[s] = append(f.later[s], value)
			}
		})
		hanging := begin(func() error { return l.dev.Write(p, 0, false) })
		<-entered
		l.disks.before = nil
		close(dropping)
		waitsOn(t, checkpoint, "the checkpoint")

		u, begun := l.dev.durable.Load(), time.Now()
		l.put(3<<regionShift + 1*chunkSize) // chunks with locks of their own
		l.put(1<<regionShift + 2*chunkSize)
		if got := time.Since(begun); got != 0 {
			t.Errorf("first writes to two regions took %v, want 0", got)
		}
		if l.dev.durable.Load() != u {
			t.Error("the generation has ended")
		}
		close(release)
		if err := errors.Join(<-hanging, <-checkpoint); err != nil {
			t.Error(err)
		}
		l.lose(0)
		l.lose(1)
	})(t)
}

// TestStopOverAStateDiskThatFails ends in order over a state disk that takes no map, or
// nothing. That is a clean end, and the next start goes on, or says why not.
func TestStopOverAStateDiskThatFails(t *testing.T) {
	for _, tc := range []struct {
		name string
		call string // that fails
		err  error
		kept bool // the generation goes on
	}{
		{"full", "create", syscall.ENOSPC, true},
		{"failing", "", syscall.EIO, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newPowerLife(t)
			l.keep()
			l.take()
			l.put(0)
			l.put(3 << regionShift)
			l.disks.before = func(what string) error {
				if strings.HasPrefix(what, tc.call) {
					return tc.err
				}
				return nil
			}
			if !tc.kept {
				l.unkept("failing")
			}
			if err := l.dev.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			l.flushed()
			l.lose(0)
			l.lose(1)
			// Somebody else's write, soon after.
			if _, err := (diskOrigin{disks: l.disks}).WriteAt(make([]byte, SectorSize), 5<<regionShift); err != nil {
				t.Fatal(err)
			}
			was := l.facts.backups[0].generation
			l.unkept("foreign")
			if got := l.lose(1).dev.Changes().Generation(); got == was {
				t.Error("the generation goes on over a write behind our back")
			}
		})
	}
}

// TestStopOverAHangingStateDisk ends in order while a state disk hangs, and a checkpoint
// over it.
func TestStopOverAHangingStateDisk(t *testing.T) {
	inBubble(func(t *testing.T) {
		l := newPowerLife(t)
		l.keep()
		l.take()
		l.put(0)
		heal := make(chan struct{})
		defer close(heal)
		l.disks.before = func(string) error {
			<-heal
			return errIO
		}
		l.dev.poke()
		time.Sleep(time.Second)
		if len(l.dev.keeping) == 0 {
			t.Error("no checkpoint hangs")
		}
		begun := time.Now()
		if err := l.dev.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if got, most := time.Since(begun), 2*l.dev.cfg.PreserveLimit; got > most {
			t.Errorf("closing took %v, want %v at most", got, most)
		}
		if err := l.dev.Reset("late"); !errors.Is(err, ErrStopping) {
			t.Errorf("reset of a closed device: %v", err)
		}
	})(t)
}
