package cow

import (
	"errors"
	"fmt"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// stateFault is what the state disk does from some call on.
type stateFault struct {
	name  string
	err   error // nil: it hangs, until the test ends
	times int   // 0: for ever
}

var stateFaults = []stateFault{
	{"full once", syscall.ENOSPC, 1},
	{"full", syscall.ENOSPC, 0},
	{"failing once", syscall.EIO, 1},
	{"failing", syscall.EIO, 0},
	{"hanging once", nil, 1},
	{"hanging", nil, 0},
}

// TestStateFaults has the state disk fail, be full, or hang at the first call that
// changes something, then at the second, and so on until there is none. Everything that
// clients of the origin ask for works, and waits no longer than for a snapstore; a
// snapshot is taken; closing is no failure. And what power leaves then misses nothing.
func TestStateFaults(t *testing.T) {
	rng := newRand(t)
	for _, f := range stateFaults {
		t.Run(f.name, func(t *testing.T) {
			k, step := 1, 1
			if *power == 0 {
				step = 5
				k += rng.IntN(step)
			}
			for ; !t.Failed() && f.at(t, k); k += step {
			}
			t.Logf("%s at one of %d of %d calls", f.name, step, k-1)
		})
	}
}

// at runs the scenario with the fault at call k, and returns false where there was no
// such call.
func (f stateFault) at(t *testing.T, k int) (met bool) {
	l := newPowerLife(t)
	l.where = fmt.Sprintf("%s at call %d", f.name, k)
	if f.err == nil {
		// In real time, because others wait for its locks.
		l.limit = 20 * time.Millisecond
		return f.run(l, k)
	}
	synctest.Test(t, func(t *testing.T) {
		l.t, l.bubble = t, true
		met = f.run(l, k)
	})
	return met
}

func (f stateFault) run(l *powerLife, k int) bool {
	calls, met, heal := 0, false, make(chan struct{})
	l.disks.before = func(what string) error {
		l.disks.mu.Lock()
		calls++
		hit := calls >= k && (f.times == 0 || calls < k+f.times)
		met = met || hit
		l.disks.mu.Unlock()
		select {
		case <-heal:
			return nil
		default:
		}
		if hit && f.err == nil {
			<-heal
			return syscall.EIO
		}
		if hit {
			return fmt.Errorf("%s: %w", what, f.err)
		}
		return nil
	}
	l.start()
	l.scenario(f.times == 0 || f.err == nil)
	l.unkept("the end")
	for _, p := range []float64{0, 1, 0.5} {
		l.lose(p)
	}
	l.timed("close", func() error { return l.dev.Close() })
	for _, p := range []float64{0, 1} {
		l.lose(p)
	}
	close(heal)
	l.stop()
	l.disks.mu.Lock() // abandoned calls may come yet
	defer l.disks.mu.Unlock()
	return met
}

// settle waits until the map is written down, or cannot be.
func (l *powerLife) settle() {
	if l.bubble {
		synctest.Wait()
		return
	}
	for begun := time.Now(); time.Since(begun) < 2*l.limit; time.Sleep(time.Millisecond) {
		if l.dev.durable.Load() != nil && len(l.dev.keeping) == 0 {
			return
		}
	}
}

// inTime checks how long something took.
func (l *powerLife) inTime(what string, begun time.Time, most time.Duration) {
	l.t.Helper()
	if !l.bubble {
		most = 20 * time.Second // others use the machine
	}
	if took := time.Since(begun); took > most {
		l.t.Errorf("%s: %s took %v, want %v at most", l.where, what, took, most)
	}
}

// timed calls f, which must succeed, and in time.
func (l *powerLife) timed(what string, f func() error) {
	l.t.Helper()
	begun := time.Now()
	if err := f(); err != nil {
		l.t.Errorf("%s: %s: %v", l.where, what, err)
	}
	// A snapshot, or a close, may need the state more than once.
	l.inTime(what, begun, 2*l.dev.cfg.PreserveLimit)
}

// prompt is timed for what must not wait longer than for a snapstore.
func (l *powerLife) prompt(what string, f func() error) {
	l.t.Helper()
	begun := time.Now()
	l.timed(what, f)
	l.inTime(what, begun, l.dev.cfg.PreserveLimit)
}

// scenario does what writes the state, in all ways that there are. persists says that
// a fault does: a note may then stay that was to be taken back.
func (l *powerLife) scenario(persists bool) {
	write := func(region int64) {
		l.prompt("write", func() error { l.put(region << regionShift); return nil })
	}
	l.settle()
	write(0)
	l.prompt("flush", l.dev.Flush)
	l.flushed()
	l.timed("take", func() error { l.take(); return nil })
	write(1)
	write(0)
	l.dev.poke()
	l.settle()
	write(2)
	for range reserveStep { // more numbers than are reserved
		l.timed("take", func() error { l.take(); return nil })
	}
	l.prompt("mark", func() error { l.mark(); return nil })
	l.unkept("reset")
	l.attempt("reset", func() error { return l.dev.Reset("test") })
	write(3)
	s, _ := l.anySnapshot()
	l.fact("roll back", func(f *powerFacts) { f.mayTear = persists })
	if l.attempt("roll back", s.images[0].Rollback) {
		l.rolledBack(s) // and it may be that this could not be noted
		l.fact("rolled back", func(f *powerFacts) { f.mayTear = true })
	}
	write(4)
	l.must(diskOrigin{disks: l.disks}.truncate(l.facts.size + 1<<regionShift))
	if l.attempt("resize", l.dev.Resize) {
		was := l.facts.size
		l.fact("grown", func(f *powerFacts) {
			f.size = l.dev.Size()
			f.now[was/SectorSize], f.now[f.size/SectorSize-1] = 0, 0
		})
	}
	l.dev.poke()
	l.settle()
	write(5)
}

// attempt calls f, which may fail for what the state disk does, but in time, and says
// whether it did not.
func (l *powerLife) attempt(what string, f func() error) bool {
	l.t.Helper()
	var err error
	l.timed(what, func() error { err = f(); return nil })
	for _, expected := range []error{nil, syscall.EIO, syscall.ENOSPC, errNoAnswer} {
		if errors.Is(err, expected) {
			return err == nil
		}
	}
	l.t.Errorf("%s: %s: %v", l.where, what, err)
	return false
}

// rolledBack notes that the device is what s is.
func (l *powerLife) rolledBack(s *Snapshot) {
	for _, b := range l.facts.backups {
		if b.name == s.name {
			l.fact("rolled back", func(f *powerFacts) {
				for no := range b.touched(*f) {
					if no*SectorSize < b.size {
						f.now[no] = b.base[no]
					}
				}
			})
		}
	}
	l.flushed()
}

// TestNoteOfARollbackIsTakenBack has the note of a rollback fail when it is there already:
// the device is not torn, and no start may say so.
func TestNoteOfARollbackIsTakenBack(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	l.put(0)
	renamed := false
	l.disks.before = func(what string) error {
		if what == "rename /state/devices/vda/rollback.new" {
			renamed = true
		} else if renamed && what == "sync /state/devices/vda" {
			renamed = false
			return errIO
		}
		return nil
	}
	if err := l.snaps[0].images[0].Rollback(); !errors.Is(err, syscall.EIO) {
		t.Errorf("rollback: got %v, want EIO", err)
	}
	l.lose(0)
	l.lose(1)
}
