package cow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newPowerLife is a life that a test leads itself, the same every time.
func newPowerLife(t *testing.T) *powerLife {
	l := &powerLife{t: t, rng: rand.New(rand.NewPCG(1, 2)), disks: newDisks(powerSize), where: "life"}
	l.facts = powerFacts{
		size: powerSize, now: make(stamps), flushed: make(stamps), later: make(map[int64][]uint64),
		reserved: true, rolling: -1,
	}
	l.disks.before = l.ask
	l.fact("start", func(*powerFacts) {})
	return l
}

// keep starts the life, and has its map written down.
func (l *powerLife) keep() {
	l.t.Helper()
	l.start()
	l.must(l.checkpoint())
	l.kept()
	l.t.Cleanup(l.stop)
}

// put is a write of one block.
func (l *powerLife) put(off int64) {
	l.t.Helper()
	p := l.data(off, blockSize)
	l.fact("put", func(f *powerFacts) {
		for s, to := sectorsOf(off, blockSize); s < to; s++ {
			f.now[s] = l.value
			f.later[s] = append(f.later[s], l.value)
		}
	})
	l.must(l.dev.Write(p, off, false))
}

// lose loses power now, with a part p of what was not flushed left, and checks what
// a start makes of it, which it returns.
func (l *powerLife) lose(p float64) *powerLife {
	l.t.Helper()
	next := &powerLife{
		t: l.t, rng: l.rng, disks: l.disks.afterCut(l.disks.length(), p, l.rng), block: l.block, still: l.still,
		booted: l.booted, facts: l.facts.clone(), value: l.value, where: fmt.Sprintf("%s, cut with %.0f %% left", l.where, 100*p),
	}
	next.disks.before = next.ask
	next.check()
	l.t.Cleanup(next.stop)
	return next
}

// TestStateDirectoryOutlivesPowerLoss loses power when the first map was written down,
// with every name gone that no directory was synced for.
func TestStateDirectoryOutlivesPowerLoss(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.lose(0)
}

// TestOriginLooksNoOlder loses power after a checkpoint. The origin must not look older
// than when its map was written down, as one does of which only the data was synced.
func TestOriginLooksNoOlder(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	l.put(0)
	l.must(l.checkpoint())
	l.lose(0)
}

// TestFirstMapKnowsEarlierWrites loses power with no write since the first map was
// written down, but with one before.
func TestFirstMapKnowsEarlierWrites(t *testing.T) {
	l := newPowerLife(t)
	entered, release := l.hold("create /state/devices/vda/map.new")
	l.start()
	t.Cleanup(l.stop)
	l.put(0) // may be before the record is there
	l.await(entered)
	close(release)
	l.must(l.checkpoint())
	l.kept()
	l.lose(1)
	l.lose(0)
}

// hold holds the first call of the state disk that begins with what up.
func (l *powerLife) hold(what string) (entered, release chan struct{}) {
	entered, release = make(chan struct{}), make(chan struct{})
	var once bool
	l.disks.before = func(op string) error {
		l.disks.mu.Lock()
		first := !once && strings.HasPrefix(op, what)
		once = once || first
		l.disks.mu.Unlock()
		if first {
			close(entered)
			<-release
		}
		return nil
	}
	return entered, release
}

// await waits for what is sure to come.
func (l *powerLife) await(c <-chan struct{}) {
	l.t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		l.fatalf("nobody comes")
	}
}

// TestMarkOutlivesPowerLoss marks a range by hand.
func TestMarkOutlivesPowerLoss(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	l.mark()
	l.lose(1)
	l.lose(0)
}

// TestResetOutlivesPowerLoss begins a generation by hand. Who did so does not trust the
// old one, so it must not come back.
func TestResetOutlivesPowerLoss(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	was := l.dev.Changes().Generation()
	entered, release := l.hold("create") // of the new record
	l.reset()
	l.await(entered)
	for _, p := range []float64{0, 1} {
		// The last number is known although the map is gone (check takes another).
		if got := l.lose(p).dev.Changes().Generation(); got == was {
			t.Error("the generation from before the reset is back")
		}
	}
	close(release)
}

// TestNumberOfALostMapIsReserved takes snapshots of a device whose map found no memory:
// a generation begins at the instant, which leaves a number out.
func TestNumberOfALostMapIsReserved(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.cat.step = func(what string) {
		if what == "make a layer" { // the number was reserved, the gate is not shut yet
			l.dev.newGeneration("no memory")
		}
	}
	for range 2 * reserveStep {
		l.unkept("lost")
		l.take()
		// The old generation may go on: its state knows of all writes.
		l.facts.backups[len(l.facts.backups)-1].generation = ""
		l.lose(0)
	}
}

// TestWriteWaitsForTheEndOfTheGeneration has the record fail, and holds up the note that
// the generation has ended: until that is done no write may go on that is not recorded.
func TestWriteWaitsForTheEndOfTheGeneration(t *testing.T) {
	l := newPowerLife(t)
	l.block = true // it has no attributes to note anything in
	l.keep()
	l.take()
	entered, release := l.hold("remove /state/devices/vda/map")
	held := l.disks.before
	l.disks.before = func(what string) error {
		if strings.HasPrefix(what, "write /state/devices/vda/regions") {
			return errIO
		}
		return held(what)
	}
	write := func(region int64) chan error {
		return begin(func() error { return l.dev.Write(make([]byte, blockSize), region<<regionShift, false) })
	}
	first := write(3)
	l.await(entered)
	second := write(4)
	stillWaits(t, first, "the write whose region could not be recorded")
	stillWaits(t, second, "a write to another region")
	close(release)
	l.must(errors.Join(<-first, <-second))
}

// TestNewMapIsNotForgotten has a record fail once, and the origin note the end of the
// generation before the map was removed. That must not remove the next one.
func TestNewMapIsNotForgotten(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.take()
	l.unkept("failing")
	entered, release := l.hold("remove /state/devices/vda/map")
	held, failed := l.disks.before, false
	l.disks.before = func(what string) error {
		if !failed && strings.HasPrefix(what, "write /state/devices/vda/regions") {
			failed = true
			return errIO
		}
		return held(what)
	}
	l.put(3 << regionShift)
	l.await(entered)
	kept := begin(l.checkpoint)
	stillWaits(t, kept, "a map while the last one is still to be removed")
	close(release)
	l.must(<-kept)
	l.kept()
	l.lose(0)
}

// TestFoundStateIsForgotten has the map in the run directory begin a generation that is
// not in the state directory yet when the process is killed. The next start goes on with
// it: what is in the state directory must not be trusted after a loss of power, from the
// first write on.
func TestFoundStateIsForgotten(t *testing.T) {
	l := newPowerLife(t)
	l.dir = t.TempDir()
	l.keep()
	l.put(0) // the lease in the state directory runs for 30 s
	l.take()
	was := l.dev.Changes().Generation()
	killed := l.dev
	t.Cleanup(func() { killed.Close() })
	killed.leaveLease()
	killed.lease.Store(1)
	if _, err := (diskOrigin{disks: l.disks}).WriteAt(make([]byte, SectorSize), 1<<20); err != nil { // somebody else's
		t.Fatal(err)
	}
	entered, release := l.hold("mkdir")
	l.open()
	l.await(entered)
	if got := l.dev.Changes().Generation(); got == was {
		t.Fatal("the start has not noticed that somebody wrote to the origin")
	}
	l.unkept("foreign")
	l.put(5 << regionShift)
	if got := l.lose(1).dev.Changes().Generation(); got == was {
		t.Error("the generation is back that a start has ended")
	}
	close(release)
}

// TestForeignWriteSoonAfterTheBoot starts the machine again within the lease, and has
// somebody else write to the origin before us: what is stamped after the boot is not ours.
func TestForeignWriteSoonAfterTheBoot(t *testing.T) {
	for _, tc := range []struct {
		name   string
		booted func(written, foreign int64) int64
		kept   bool
	}{
		{"before the boot, as ours", func(_, foreign int64) int64 { return foreign }, true},
		{"after the boot", func(_, foreign int64) int64 { return foreign - 1 }, false},
		{"with a clock that was set back", func(written, _ int64) int64 { return written - 1 }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newPowerLife(t)
			l.keep()
			l.take()
			was := l.dev.Changes().Generation()
			l.put(0)
			written := l.disks.origin.changed
			for time.Now().UnixNano() <= written {
			}
			if !tc.kept {
				l.unkept("foreign")
			}
			if _, err := (diskOrigin{disks: l.disks}).WriteAt(make([]byte, SectorSize), 5<<regionShift); err != nil {
				t.Fatal(err)
			}
			foreign := l.disks.origin.changed
			if until := l.dev.durable.Load().lease.Load(); foreign > until {
				t.Skipf("the write came %v after the lease", time.Duration(foreign-until))
			}
			l.booted = tc.booted(written, foreign)
			next := l.lose(1)
			why, _ := next.why.Load().(string)
			if kept := next.dev.Changes().Generation() == was; kept != tc.kept || !kept && !strings.Contains(why, "behind our back") {
				t.Errorf("the generation is kept: %v, because %q\nwant %v", kept, why, tc.kept)
			}
		})
	}
}

// TestBootTime compares it with the uptime that the kernel tells in seconds.
func TestBootTime(t *testing.T) {
	var info unix.Sysinfo_t
	from := time.Now()
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	up := time.Duration(info.Uptime) * time.Second
	from, to := from.Add(-up-time.Second), time.Now().Add(-up+time.Second) // it may be rounded either way
	if got := time.Unix(0, bootTime()); got.Before(from) || got.After(to) {
		t.Errorf("the machine was started at %v, want from %v to %v", got, from, to)
	}
}

// TestRunDirectoryIsLost kills the process and takes away what the run directory has,
// in the same boot. The lease in the state directory runs on for longer than anybody's
// writes can be told from ours: only the one in the run directory says whose they are.
func TestRunDirectoryIsLost(t *testing.T) {
	for _, tc := range []struct {
		name          string
		lost          string // of the device's directory
		ours, foreign bool   // who wrote since the map was written down
		kept          bool
		why           string
	}{
		{"all of it, nobody wrote", "", false, false, true, ""},
		{"all of it, we wrote", "", true, false, false, "nobody knows who wrote last"},
		{"all of it, somebody wrote", "", false, true, false, "nobody knows who wrote last"},
		{"the map, we wrote", "changes", true, false, true, ""},
		{"the map, somebody wrote", "changes", true, true, false, "behind our back"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newPowerLife(t)
			l.dir = t.TempDir()
			l.keep()
			l.put(0) // the lease in the state directory runs for 30 s
			l.take()
			l.must(l.checkpoint())
			was := l.dev.Changes().Generation()
			if tc.ours {
				l.put(0)
			}
			killed := l.dev
			t.Cleanup(func() { killed.Close() })
			killed.leaveLease()
			if tc.foreign {
				killed.lease.Store(1)
				if _, err := (diskOrigin{disks: l.disks}).WriteAt(make([]byte, SectorSize), 5<<regionShift); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.RemoveAll(filepath.Join(l.cat.deviceDir("vda"), tc.lost)); err != nil {
				t.Fatal(err)
			}
			l.open()
			why, _ := l.why.Load().(string)
			if kept := l.dev.Changes().Generation() == was; kept != tc.kept || !kept && !strings.Contains(why, tc.why) {
				t.Errorf("the generation is kept: %v, because %q\nwant %v, %q", kept, why, tc.kept, tc.why)
			}
		})
	}
}

// TestHalfARecordIsHealed damages the newer header of a record, the only one that says
// which set has the last regions. The start that finds it knows them from both sets. The
// next header is written over the damaged one: after another loss of power they must be in
// the set that it names.
func TestHalfARecordIsHealed(t *testing.T) {
	l := newPowerLife(t)
	l.keep()
	l.put(0)
	l.take()
	l.must(l.checkpoint()) // the other set counts, says the last header that is written
	seq := l.dev.durable.Load().regions.state.seq
	l.put(3 << regionShift)
	if got := l.dev.durable.Load().regions.state.seq; got != seq {
		t.Fatalf("header %d was written after the checkpoint wrote %d", got, seq)
	}
	next := &powerLife{
		t: t, rng: l.rng, disks: l.disks.afterCut(l.disks.length(), 1, l.rng),
		facts: l.facts.clone(), value: l.value, where: "half a record",
	}
	next.disks.before = next.ask
	node := next.disks.root.names["state"].names["devices"].names["vda"].names["regions"]
	node.patch(int64(seq%2)*regionsHeader+20, 0xff)
	next.disks.boot()
	next.check() // and takes a snapshot, for which a header is written
	t.Cleanup(next.stop)
	if !next.dev.durable.Load().regions.note(3<<regionShift, 1) {
		t.Error("a region that one of the sets has is not recorded")
	}
	next.lose(0)
	next.lose(1)
}
