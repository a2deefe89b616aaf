package cow

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// rollbackSize is that of the device in rollbackLives.
const rollbackSize = 3<<20 + 512

// rollbackLife is what a step of a rollback leaves.
type rollbackLife struct {
	*home
	what       string
	generation string
	number     uint64 // of the newer snapshot
	torn       bool   // the device is noted to be between two states
	done       bool   // it is what the image is
}

// rollbackRanges are what of the device in rollbackLives has data: several windows of
// it, whole chunks, parts of some, and its end.
var rollbackRanges = [][2]int64{{0, 140 << 10}, {1<<20 - 512, 1<<20 + 4096}, {2 << 20, 2<<20 + 4096}, {3 << 20, rollbackSize}}

// The bytes of the device in rollbackLives at its snapshots, and when the rollback
// to old begins.
func rollbackStates() (old, newer, live []byte) {
	old, newer = make([]byte, rollbackSize), make([]byte, rollbackSize)
	for _, r := range rollbackRanges {
		fill(old, 1, r[0], r[1]-r[0])
		fill(newer, 2, r[0], r[1]-r[0])
	}
	live = slices.Clone(newer)
	fill(live, 3, 64<<10, 100<<10)
	return old, newer, live
}

// rollbackLives rolls a device back from the second to the first of two snapshots and
// keeps what each step leaves.
func rollbackLives(t *testing.T) []rollbackLife {
	t.Helper()
	h := newHome(t, rollbackSize)
	h.dir = filepath.Join(h.dir, "site")
	h.state, h.moved = filepath.Join(h.dir, "state"), true
	if err := os.MkdirAll(filepath.Join(h.dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(h.dir, "vda"), make([]byte, rollbackSize), 0o600); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var lives []rollbackLife
	now := rollbackLife{} // what is true at the next step
	begun := false
	var steps met
	h.step = func(what string) {
		mu.Lock()
		defer mu.Unlock()
		if !begun {
			return
		}
		steps.add(what)
		switch what {
		case "note a tear":
			now.torn = true
		case "take back the note of a tear":
			now.torn, now.done = false, true
		}
		l := now
		l.what = fmt.Sprintf("step %d, %s", len(lives), what)
		l.home = &home{t: t, dir: fmt.Sprintf("%s-%d", h.dir, len(lives)), moved: true}
		l.state = filepath.Join(l.dir, "state")
		copyTree(t, h.dir, l.dir)
		lives = append(lives, l)
	}
	h.open()
	h.waitDurable()
	for _, r := range rollbackRanges {
		put(t, h.dev, 1, r[0], r[1]-r[0])
	}
	old := h.take("old")
	for _, r := range rollbackRanges {
		put(t, h.dev, 2, r[0], r[1]-r[0])
	}
	newer := h.take("newer")
	put(t, h.dev, 3, 64<<10, 100<<10)
	mu.Lock()
	begun = true
	now.generation, now.number = h.dev.Changes().Generation(), image(t, newer, "vda").Changes().Number()
	mu.Unlock()
	if err := image(t, old, "vda").Rollback(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	begun = false
	mu.Unlock()
	h.close()
	steps.check(t, "a rollback")
	if !now.done {
		t.Fatal("it was never noted that the device is torn")
	}
	return lives
}

// TestRollbackKilledAtEveryStep starts on what each step of a rollback leaves: it is
// pending from before the first change to the origin until after the last, nobody
// else can write meanwhile, and calling it again brings it to its end.
func TestRollbackKilledAtEveryStep(t *testing.T) {
	lives := rollbackLives(t)
	old, newer, _ := rollbackStates()
	resumed := 0
	for k, l := range lives {
		snaps := l.open()
		switch i := image(t, snaps["old"], "vda"); {
		case l.dev.RollingBack() == i:
			resumed++
			if err := l.dev.Write([]byte{9}, 0, false); !errors.Is(err, ErrRollback) {
				t.Errorf("%s: a write to a device that has to be rolled back further: %v", l.what, err)
			}
			if err := snaps["old"].Destroy(true); !errors.Is(err, ErrRollback) {
				t.Errorf("%s: destroying what a device has to be rolled back to: %v", l.what, err)
			}
			if err := i.Rollback(); err != nil {
				t.Errorf("%s: %v", l.what, err)
			}
		case k != len(lives)-1:
			t.Errorf("%s: the rollback is not pending", l.what)
		}
		if got := l.dev.State(); got != "ok" {
			t.Errorf("%s: state at the end: %s", l.what, got)
		}
		wantBytes(t, l.what+": the device", l.dev, old)
		wantBytes(t, l.what+": the older image", image(t, snaps["old"], "vda"), old)
		wantBytes(t, l.what+": the newer image", image(t, snaps["newer"], "vda"), newer)
		l.wantIncrement(newer, old)
		if err := Check(l.pool, l.dev); err != nil {
			t.Errorf("%s: %v", l.what, err)
		}
		put(t, l.dev, 4, 0, 512)
		l.close()
		if t.Failed() {
			return
		}
	}
	if resumed != len(lives)-1 {
		t.Errorf("resumed %d times after %d steps", resumed, len(lives))
	}
	t.Logf("killed after each of %d steps", len(lives))
}

// TestRollbackGoesOnWithoutState starts on what each step of a rollback leaves, and the state
// directory is not to be had. Nobody can see the note of the tear, but what has begun to
// write back comes to its end; what has not is refused, and has changed nothing. With the
// state directory again nothing is left of either.
func TestRollbackGoesOnWithoutState(t *testing.T) {
	old, _, before := rollbackStates()
	torn := 0
	for _, l := range rollbackLives(t) {
		if l.done {
			continue
		}
		l.disk = noDisk{unanswered{errIO}}
		snaps := l.open()
		err := image(t, snaps["old"], "vda").Rollback()
		want := before
		if l.torn {
			torn++
			want = old
		}
		if (err == nil) != l.torn {
			t.Errorf("%s: torn %v: %v", l.what, l.torn, err)
		}
		wantBytes(t, l.what+": the device", l.dev, want)
		l.close()

		l.disk = nil
		snaps = l.open()
		if got := l.dev.State(); (got == "ok") == l.torn {
			t.Errorf("%s: state with the note that is left: %s", l.what, got)
		}
		if err := image(t, snaps["old"], "vda").Rollback(); err != nil {
			t.Errorf("%s: %v", l.what, err)
		}
		if got := l.dev.State(); got != "ok" {
			t.Errorf("%s: state at the end: %s", l.what, got)
		}
		wantBytes(t, l.what+": the device at the end", l.dev, old)
		l.close()
		if t.Failed() {
			return
		}
	}
	if torn == 0 {
		t.Error("no step left a device that was torn")
	}
}

// wantIncrement checks that what changed since the newer snapshot makes live of what
// that held.
func (l rollbackLife) wantIncrement(newer, live []byte) {
	l.t.Helper()
	if got := l.dev.Changes().Generation(); got != l.generation {
		l.t.Fatalf("%s: a new generation has begun", l.what)
	}
	runs, ok := l.dev.Changes().Since(l.number)
	if !ok {
		l.t.Fatalf("%s: what changed is not known", l.what)
	}
	copied := slices.Clone(newer)
	applyRuns(l.t, copied, live, runs)
	if at := firstDiff(copied, live); at >= 0 {
		l.t.Errorf("%s: the increment misses byte %d", l.what, at)
	}
}

// TestRollbackOverReboot starts on what each step of a rollback leaves as if the
// machine had been started anew. The snapshots are gone. Where some but not all was
// written back, the device is served and says that it is torn, until it is removed.
func TestRollbackOverReboot(t *testing.T) {
	lives := rollbackLives(t)
	old, newer, before := rollbackStates()
	torn := 0
	for _, l := range lives {
		l.forgetRun()
		for start := range 2 {
			what := fmt.Sprintf("%s, then a reboot, start %d", l.what, start+1)
			told := ""
			l.notify = func(e Event) {
				if e.Kind == EventRollbackFailed {
					told = e.Snapshot
				}
			}
			l.open()
			live := make([]byte, rollbackSize)
			if err := l.dev.Read(live, 0); err != nil {
				t.Fatal(err)
			}
			want := before
			if l.done {
				want = old
			}
			switch state := l.dev.State(); {
			case l.torn:
				torn++
				if !strings.HasPrefix(state, "failed: a rollback to old did not end") || told != "old" {
					t.Errorf("%s: state %q and an event about %q, want failed and old", what, state, told)
				}
			case state != "ok" || told != "":
				t.Errorf("%s: state %q and an event about %q, want ok and none", what, state, told)
			case !bytes.Equal(live, want):
				t.Errorf("%s: the device is another at %d, and nobody knows", what, firstDiff(live, want))
			}
			if l.dev.RollingBack() != nil {
				t.Errorf("%s: a rollback is pending to a snapshot that is gone", what)
			}
			l.wantIncrement(newer, live)
			if start == 0 {
				l.close()
			}
		}
		put(t, l.dev, 4, 0, 512)
		if err := errors.Join(l.dev.Remove(), l.pool.Close(), l.cat.Close()); err != nil {
			t.Error(err)
		}
		if l.open(); l.dev.State() != "ok" {
			t.Errorf("%s: state after it was removed and added: %s", l.what, l.dev.State())
		}
		l.close()
		if t.Failed() {
			return
		}
	}
	if torn == 0 {
		t.Error("no reboot found the device torn")
	}
	t.Logf("rebooted after each of %d steps", len(lives))
}

// TestRollbackOverClose closes a device in the middle of a rollback, which goes on
// when it is open again.
func TestRollbackOverClose(t *testing.T) {
	const size = 3 << 20
	h := newHome(t, size)
	h.open()
	put(t, h.dev, 1, 0, size)
	i := image(t, h.take("s"), "vda")
	put(t, h.dev, 2, 0, size)
	entered, release := make(chan struct{}), make(chan struct{})
	reads := 0
	h.part.hook(func(op string, _, _ int64) error {
		if op == "read" {
			if reads++; reads == 2 {
				close(entered)
				<-release
			}
		}
		return nil
	})
	rollback := begin(i.Rollback)
	<-entered
	closed := begin(h.dev.Close)
	stillWaits(t, closed, "closing in the middle of a rollback")
	close(release)
	if err := <-rollback; !errors.Is(err, ErrStopping) {
		t.Errorf("rollback of a device that is closed: got %v, want ErrStopping", err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
	h.close()

	i = image(t, h.open()["s"], "vda")
	if h.dev.RollingBack() != i {
		t.Fatal("the rollback is not pending")
	}
	if err := i.Rollback(); err != nil {
		t.Error(err)
	}
	want(t, h.dev, 1, 0, size)
	h.close()
	if h.open(); h.dev.RollingBack() != nil {
		t.Error("a rollback is pending that has ended")
	}
	h.close()
}

// TestRollbackToALostImage has the snapstore go between two starts: the device
// cannot be rolled back further, and must be of use all the same.
func TestRollbackToALostImage(t *testing.T) {
	const size = 1 << 20
	h := newHome(t, size)
	h.open()
	put(t, h.dev, 1, 0, size)
	i := image(t, h.take("s"), "vda")
	put(t, h.dev, 2, 0, size)
	if err := i.pend(); err != nil {
		t.Fatal(err)
	}
	h.close()
	if err := os.Remove(filepath.Join(h.dir, "store")); err != nil {
		t.Fatal(err)
	}
	s := h.open()["s"]
	if h.dev.RollingBack() != nil || s.State() == "ok" {
		t.Errorf("a rollback to an image that is %s is pending", s.State())
	}
	if got := h.dev.State(); got != "ok" {
		t.Errorf("state of a device to which nothing was written back: %s", got)
	}
	put(t, h.dev, 3, 0, size)
	if err := s.Destroy(false); err != nil {
		t.Error(err)
	}
	h.close()
}

// TestTornByALostImage has the snapstore go where a killed process had written
// something back.
func TestTornByALostImage(t *testing.T) {
	for _, l := range rollbackLives(t) {
		if !l.torn {
			continue
		}
		if err := os.Remove(filepath.Join(l.dir, "store")); err != nil {
			t.Fatal(err)
		}
		told := 0
		l.notify = func(e Event) {
			if e.Kind == EventRollbackFailed {
				told++
			}
		}
		s := l.open()["old"]
		if got := l.dev.State(); l.dev.RollingBack() != nil || s.State() == "ok" || told != 1 ||
			!strings.HasPrefix(got, "failed: a rollback to old did not end") {
			t.Errorf("told %d times that a device is torn whose snapshot is %s: %q", told, s.State(), got)
		}
		put(t, l.dev, 3, 0, rollbackSize)
		l.close()
		return
	}
}
