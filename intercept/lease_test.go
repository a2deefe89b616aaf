package intercept

import (
	"sync"
	"sync/atomic"
	"testing"
)

// TestLease closes a lease among requests that come and go: the export is
// released once, when none is in the device, and none gets in afterwards.
func TestLease(t *testing.T) {
	for range 200 {
		var inside, released atomic.Int64
		l := &lease{release: func() {
			if n := inside.Load(); n != 0 {
				t.Errorf("released with %d requests inside", n)
			}
			released.Add(1)
		}}
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				for n := range 200 {
					if i < 2 && n == 100 {
						l.close()
					}
					if l.enter() {
						inside.Add(1)
						if released.Load() > 0 {
							t.Error("a request entered after the release")
						}
						inside.Add(-1)
						l.leave()
					}
				}
			})
		}
		wg.Wait()
		if l.enter() {
			t.Error("a closed lease let a request in")
		}
		if got := released.Load(); got != 1 {
			t.Fatalf("releases\n got %d\nwant 1", got)
		}
		if !l.idle() || !l.isClosed() {
			t.Errorf("at the end: idle %t, closed %t, want true, true", l.idle(), l.isClosed())
		}
	}
}

func TestLeaseClosedWhileIdle(t *testing.T) {
	released := 0
	l := &lease{release: func() { released++ }}
	if !l.enter() || l.idle() {
		t.Fatal("a fresh lease: cannot enter, or is idle with a request inside")
	}
	l.leave()
	if !l.idle() || l.isClosed() || released != 0 {
		t.Fatalf("after the request: idle %t, closed %t, released %d", l.idle(), l.isClosed(), released)
	}
	l.close()
	l.close()
	if released != 1 {
		t.Errorf("releases\n got %d\nwant 1", released)
	}
}
