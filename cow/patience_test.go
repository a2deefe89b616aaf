package cow

import (
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestStartOverAHangingStateDisk has the state disk hang at the first call of a start, then
// at the second, and so on until there is none. The origin is served in time all the same,
// the device says why its history is lost, where it is, and when the disk answers again all
// is kept as before. Power that is lost at any time brings back nothing that is wrong.
func TestStartOverAHangingStateDisk(t *testing.T) {
	for _, tc := range []struct {
		name        string
		block, boot bool // a block device; another boot
		clean       bool // the end before
	}{
		{"same boot", false, false, false},
		{"another boot", false, true, false},
		{"another boot after a clean end", false, true, true},
		{"block device", true, false, false},
		{"block device in another boot", true, true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			k := int64(1)
			for met := true; met && !t.Failed(); k++ {
				synctest.Test(t, func(t *testing.T) {
					l := newPowerLife(t)
					l.dir, l.block = t.TempDir(), tc.block
					l.keep()
					l.take()
					l.put(0)
					l.put(3 << regionShift)
					if tc.clean {
						l.must(l.dev.Close())
						l.flushed()
					}
					met = startHanging(l, k, tc.boot)
				})
			}
			t.Logf("hanging at each of %d calls", k-2)
			if k < 8 {
				t.Errorf("the state disk was called %d times", k-2)
			}
		})
	}
}

// startHanging starts after l with the state disk hanging at call k, and returns false where
// there was no such call.
func startHanging(l *powerLife, k int64, boot bool) (met bool) {
	was := l.dev.Changes().Generation()
	next := l
	if boot {
		next = &powerLife{
			t: l.t, rng: l.rng, disks: l.disks.afterCut(l.disks.length(), 1, l.rng), block: l.block,
			facts: l.facts.clone(), value: l.value,
		}
		l.t.Cleanup(next.stop)
	} else {
		l.must(l.dev.Close())
		l.flushed()
	}
	next.bubble, next.where = true, fmt.Sprintf("hanging at call %d", k)
	next.timeline = []powerFacts{next.facts}
	next.fact("hang", func(f *powerFacts) { f.generation, f.reserved = "", false })
	heal := make(chan struct{})
	var calls atomic.Int64
	next.disks.looking = func(string) error {
		if calls.Add(1) >= k {
			<-heal
		}
		return nil
	}
	next.disks.before = next.disks.looking
	begun := time.Now()
	if boot {
		next.start()
	} else {
		next.open()
	}
	next.inTime("the start", begun, next.dev.cfg.PreserveLimit)
	synctest.Wait()

	generation := next.dev.Changes().Generation()
	why, _ := next.why.Load().(string)
	if generation != was && !next.block && !strings.Contains(why, "no answer") {
		l.t.Errorf("%s: %s, want one for a state directory without an answer", next.where, why)
	}
	for _, b := range next.facts.backups {
		next.checkIncrement(b, generation)
	}
	next.prompt("write", func() error { next.put(5 << regionShift); return nil })
	next.prompt("flush", next.dev.Flush)
	next.flushed()
	next.timed("take", func() error { next.take(); return nil })
	if !next.block { // which has no place for a note
		next.lose(0)
		next.lose(1)
	}
	close(heal)
	time.Sleep(2 * checkpointEvery)
	if got := next.dev.State(); got != "ok" {
		l.t.Errorf("%s: the device is %q when the disk answers again", next.where, got)
	}
	if next.dev.durable.Load() == nil {
		l.t.Errorf("%s: nothing outlives the machine when the disk answers again", next.where)
	}
	next.kept()
	next.put(4 << regionShift)
	next.lose(0)
	next.lose(1)
	return calls.Load() >= k
}

// TestUnreadNoteIsReadLater has the state disk hang at the note of a rollback alone.
func TestUnreadNoteIsReadLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newPowerLife(t)
		l.dir = t.TempDir()
		l.keep()
		l.must(l.dev.Close())
		heal := make(chan struct{})
		l.disks.looking = func(what string) error {
			if what == "open /state/devices/vda/rollback" {
				<-heal
			}
			return nil
		}
		l.open()
		if got, want := l.dev.State(), "failed: cannot tell whether a rollback has ended: "; !strings.HasPrefix(got, want) {
			t.Errorf("state\n got %s\nwant %s", got, want)
		}
		close(heal)
		time.Sleep(2 * checkpointEvery)
		if got := l.dev.State(); got != "ok" {
			t.Errorf("state when the disk answers again\n got %s\nwant ok", got)
		}
	})
}
