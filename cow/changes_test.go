package cow

import (
	"fmt"
	"syscall"
	"testing"
)

// TestTracking compares what costs nothing with what it costs something to look at.
func TestTracking(t *testing.T) {
	r := newRig(t, 1, 1<<20, 16<<20)
	d := r.devs[0]
	for _, tc := range []struct {
		name string
		do   func() error
	}{
		{"a new device", func() error { return nil }},
		{"a snapshot", func() error { r.take("a"); return nil }},
		{"another", func() error { r.take("b"); return nil }},
		{"a new generation", func() error { return d.Reset("test") }},
		{"a snapshot of it", func() error { r.take("c"); return nil }},
		{"a larger device", func() error { r.resize(0, 3<<20); return nil }},
		{"a snapshot that failed", func() error {
			if _, err := r.cat.Take("d", append(r.devs, r.devs...), TakeOptions{}); err == nil {
				return syscall.EINVAL
			}
			return nil
		}},
	} {
		if err := tc.do(); err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		type all struct {
			generation        string
			number, base      uint64
			mapSize, unitSize int64
		}
		got, c := d.Tracking(), d.Changes()
		g := all{got.Generation(), got.Number(), got.Base(), got.MapSize(), got.BlockSize()}
		w := all{c.Generation(), c.Number(), c.Base(), c.MapSize(), c.BlockSize()}
		if g != w {
			t.Errorf("after %s\n got %+v\nwant %+v", tc.name, g, w)
		}
	}
	var sum uint64
	if n := testing.AllocsPerRun(100, func() { sum += d.Tracking().Number() }); n != 0 {
		t.Errorf("asking for the number allocates %v times", n)
	}
}

// TestReasonBelongsToItsGeneration starts on what each step leaves by which a generation
// begins: nobody is told of one why another began.
func TestReasonBelongsToItsGeneration(t *testing.T) {
	h := newHome(t, siteSize)
	h.moved = true
	var steps met
	var lives []*home
	var at []string
	h.step = func(what string) {
		steps.add(what)
		l := &home{t: t, dir: fmt.Sprintf("%s-%d", h.dir, len(lives)), moved: true}
		copyTree(t, h.dir, l.dir)
		lives, at = append(lives, l), append(at, what)
	}
	h.open()
	first := h.dev.Tracking()
	reasons := map[string]string{first.Generation(): "the device is new"}
	for _, why := range []string{"first", "second, for a longer reason", "third"} {
		if err := h.dev.Reset(why); err != nil {
			t.Fatal(err)
		}
		now := h.dev.Tracking()
		reasons[now.Generation()] = why
		if got := now.Reason(); got != why {
			t.Errorf("reason\n got %q\nwant %q", got, why)
		}
	}
	h.close()
	steps.check(t, "a generation")
	for k, l := range lives {
		l.open()
		now := l.dev.Tracking()
		got, want := now.Reason(), reasons[now.Generation()]
		unknown := at[k] == "note a reason" && got == "" // of the generation that has not ended
		if want == "" || got != want && !unknown {
			t.Errorf("killed at step %d, %s: generation %s, reason\n got %q\nwant %q", k, at[k], now.Generation(), got, want)
		}
		l.close()
	}
}
