package cow

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"blksnap/store"
)

// successor is the life of the process after this one in the same boot, on the disks and in the
// run directory as they are now. It has opened no device yet.
func (l *powerLife) successor(where string) *powerLife {
	l.t.Helper()
	next := &powerLife{
		t: l.t, rng: l.rng, disks: l.disks.afterCut(l.disks.length(), 1, l.rng), block: l.block, still: l.still,
		booted: l.booted, facts: l.facts.clone(), value: l.value, where: where,
	}
	next.disks.before = next.ask
	next.timeline = []powerFacts{next.facts}
	if l.dir != "" {
		next.dir = l.t.TempDir()
		copyTree(l.t, l.dir, next.dir)
	}
	var err error
	next.cat, err = openCatalogue(next.dir, l.cat.boot)
	l.must(err)
	next.cat.state, next.cat.disk, next.cat.booted = "/state", next.disks, l.cat.booted
	m, err := store.OpenMem(256 << 20)
	l.must(err)
	next.part = &part{Part: m}
	next.pool = store.NewPool(next.part)
	return next
}

// withoutState is a successor that cannot have the state directory.
func (l *powerLife) withoutState(why error) *powerLife {
	l.t.Helper()
	next := l.successor("without state")
	next.cat.WithoutState(fmt.Errorf("open lock: %w", why))
	next.fact("without state", func(f *powerFacts) { f.generation, f.reserved = "", false })
	return next
}

// TestStartWithoutState goes on without the state directory after a process that was killed
// or has ended, and then with it, or not, before power is lost. The device is served, what
// is written meanwhile is in each increment that is told of later, and the state disk is not
// even looked at.
func TestStartWithoutState(t *testing.T) {
	for _, tc := range []struct {
		name         string
		block, clean bool // a block device; the end before
	}{
		{"killed", false, false},
		{"ended", false, true},
		{"block device, killed", true, false},
		{"block device, ended", true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newPowerLife(t)
			l.dir, l.block, l.still = t.TempDir(), tc.block, !tc.block // nobody sees who wrote
			l.keep()
			l.take()
			l.put(0)
			if tc.clean {
				l.must(l.dev.Close())
				l.flushed()
			}
			was := l.dev.Changes().Generation()

			without := l.successor("without state")
			without.cat.WithoutState(fmt.Errorf("open lock: %w", syscall.EIO))
			touched := func(what string) error {
				t.Errorf("the state disk was asked: %s", what)
				return nil
			}
			without.disks.looking, without.disks.before = touched, touched
			without.fact("without state", func(f *powerFacts) { f.generation, f.reserved = "", false })
			without.open()
			t.Cleanup(without.stop)
			if got := without.dev.Changes().Generation(); got != was {
				t.Errorf("generation in the same boot\n got %s, %v\nwant %s", got, without.why.Load(), was)
			}
			const state = "failed: cannot tell whether a rollback has ended: open lock: input/output error"
			if got := without.dev.State(); got != state {
				t.Errorf("state\n got %s\nwant %s", got, state)
			}
			without.put(3 << regionShift)
			without.must(without.dev.Flush())
			without.flushed()
			if !tc.block { // which has no place for a note
				without.lose(0)
				without.lose(1)
			}

			with := without.successor("with state again")
			with.open()
			t.Cleanup(with.stop)
			if got := with.dev.Changes().Generation(); got != was {
				t.Errorf("generation in the same boot\n got %s, %v\nwant %s", got, with.why.Load(), was)
			}
			for _, b := range with.facts.backups {
				with.checkIncrement(b, was)
			}
			with.lose(0)
			with.lose(1)
			with.must(with.checkpoint())
			with.kept()
			if got := with.dev.State(); got != "ok" {
				t.Errorf("state\n got %s\nwant ok", got)
			}
			with.lose(0)
		})
	}
}

// TestRebootWithoutState begins a generation where the map is only in the state directory,
// and says why. Numbers of the one before mean nothing in it.
func TestRebootWithoutState(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	l.must(l.dev.Close())
	without := l.withoutState(syscall.EROFS)
	without.open()
	t.Cleanup(without.stop)
	if got, want := fmt.Sprint(without.why.Load()), "open lock: read-only file system"; !strings.Contains(got, want) {
		t.Errorf("why the generation began\n got %s\nwant %s", got, want)
	}
	for _, b := range without.facts.backups {
		without.checkIncrement(b, without.dev.Changes().Generation())
	}
}

// TestRollbackWithoutState is refused: whoever comes after it could not know of a device
// that is between two states.
func TestRollbackWithoutState(t *testing.T) {
	l := newPowerLife(t)
	l.dir = t.TempDir()
	l.keep()
	without := l.withoutState(syscall.EIO)
	without.open()
	t.Cleanup(without.stop)
	without.take()
	without.put(0)
	err := without.snaps[0].images[0].Rollback()
	if err == nil || !strings.Contains(err.Error(), "note the rollback: cannot tell whether a rollback has ended") {
		t.Errorf("a rollback without state: %v, want it to be refused", err)
	}
	if got := without.onDisk(0); got != without.value {
		t.Errorf("the refused rollback changed the origin: sector 0 holds %d, want %d", got, without.value)
	}
}

// TestRemoveWithoutState removes a device of a start that has no state directory. The next
// start, which has it, finds a map there that ended in order, and must not believe it: nothing
// in the run directory says any more what was written since.
func TestRemoveWithoutState(t *testing.T) {
	l := newPowerLife(t)
	l.dir, l.block = t.TempDir(), true
	l.keep()
	l.take()
	l.put(0)
	l.must(l.dev.Close())
	l.flushed()
	was := l.dev.Changes().Generation()

	without := l.withoutState(syscall.EIO)
	without.open()
	without.put(3 << regionShift)
	without.must(without.dev.Flush())
	without.flushed()
	if err := without.dev.Remove(); err == nil {
		t.Error("a device was removed without the state directory, and nothing said that its state stays")
	}

	with := without.successor("with state again")
	with.open()
	t.Cleanup(with.stop)
	if got := with.dev.Changes().Generation(); got == was {
		t.Errorf("generation %s goes on after the device was removed", got)
	}
	for _, b := range with.facts.backups {
		with.checkIncrement(b, was)
	}
}

// TestOtherNameWithoutState reboots after a clean end, and serves the disk under another name
// without the state directory. The start after that, under the first name, finds a map that
// looks sound: only the other device's lease file knows who wrote.
func TestOtherNameWithoutState(t *testing.T) {
	for _, kept := range []bool{true, false} {
		t.Run(fmt.Sprintf("kept %v", kept), func(t *testing.T) {
			l := newPowerLife(t)
			l.dir, l.block = t.TempDir(), true
			l.keep()
			l.take()
			l.put(0)
			l.must(l.dev.Close())
			l.flushed()
			was := l.dev.Changes().Generation()

			l.dir, l.cat.boot = t.TempDir(), uuid.NewString()
			without := l.withoutState(syscall.EIO)
			without.name = "vdb"
			without.open()
			_, _, err := without.cat.Recover()
			without.must(err)
			without.put(3 << regionShift)
			without.must(without.dev.Flush())
			without.flushed()
			if kept {
				without.must(without.dev.Close())
			} else if err := without.dev.Remove(); err == nil {
				t.Error("a device was removed without the state directory, and nothing said that its state stays")
			}

			with := without.successor("with state again")
			with.open()
			t.Cleanup(with.stop)
			if got := with.dev.Changes().Generation(); got == was {
				t.Errorf("generation %s goes on after the disk was served under another name", got)
			}
			for _, b := range with.facts.backups {
				with.checkIncrement(b, was)
			}
		})
	}
}
