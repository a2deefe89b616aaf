package cow

import (
	"testing"
	"time"
)

// leaseTest runs a test in which time passes only when everybody waits, with a life
// whose map was written down.
func leaseTest(f func(t *testing.T, l *powerLife)) func(t *testing.T) {
	return inBubble(func(t *testing.T) {
		l := newPowerLife(t)
		l.keep()
		f(t, l)
	})
}

// wantOurs checks that the last stamp of the origin is within both leases.
func (l *powerLife) wantOurs(when string) {
	l.t.Helper()
	changed := l.disks.origin.changed
	if until := l.dev.lease.Load(); changed > until {
		l.t.Errorf("%s: a write of ours is %v beyond the lease", when, time.Duration(changed-until))
	}
	r, err := openRegions(l.disks, l.dev.regionsPath())
	if err != nil {
		l.fatalf("%v", err)
	}
	if until := r.state.lease; changed > until {
		l.t.Errorf("%s: a write of ours is %v beyond the durable lease", when, time.Duration(changed-until))
	}
}

// slowWrite writes to an origin that takes as long as it takes.
func (l *powerLife) slowWrite(took time.Duration) {
	l.t.Helper()
	sleep := func() { time.Sleep(took) }
	l.disks.pause.Store(&sleep)
	defer l.disks.pause.Store(nil)
	l.must(l.dev.Write(make([]byte, blockSize), 0, false))
}

// TestSlowWriteIsOurs has an origin hang, for longer than any lease, before it stamps
// the inode. When the process is killed then, or power is lost, it must not look
// as if somebody else had written.
func TestSlowWriteIsOurs(t *testing.T) {
	for _, took := range []time.Duration{0, runLease - time.Millisecond, 3 * runLease, stateLease, 5 * time.Minute} {
		t.Run(took.String(), leaseTest(func(t *testing.T, l *powerLife) {
			time.Sleep(time.Hour)
			l.slowWrite(took)
			l.wantOurs("at once")
			time.Sleep(time.Minute)
			l.wantOurs("a minute later")
		}))
	}
}

// TestLeaseEnds writes to the origin in somebody else's name soon after our last write.
func TestLeaseEnds(t *testing.T) {
	for _, took := range []time.Duration{0, 5 * time.Minute} {
		t.Run(took.String(), leaseTest(func(t *testing.T, l *powerLife) {
			was, err := l.dev.file.identify(false)
			l.must(err)
			l.slowWrite(took)
			time.Sleep(runLease + time.Millisecond)
			if _, err := l.dev.file.WriteAt(make([]byte, SectorSize), 0); err != nil {
				t.Fatal(err)
			}
			now, err := l.dev.file.identify(false)
			l.must(err)
			if was.foreign(now, time.Unix(0, l.dev.lease.Load()), true, false) == nil {
				t.Errorf("a write behind our back, %v after our last one, looks like ours", runLease)
			}
			time.Sleep(time.Hour)
			if l.dev.leaseTimer.Stop() {
				t.Error("a timer runs for a device that nobody writes to")
			}
		}))
	}
}

// TestSleptMachineIsOurs has the machine sleep in the middle of a write: the clock has
// gone on, and the write has ended before any timer fires.
func TestSleptMachineIsOurs(t *testing.T) {
	leaseTest(func(t *testing.T, l *powerLife) {
		l.slowWrite(0)
		l.dev.leaseTimer.Stop() // timers do not fire while the machine sleeps
		time.Sleep(time.Hour)
		if _, err := l.dev.file.WriteAt(make([]byte, SectorSize), 0); err != nil {
			t.Fatal(err)
		}
		l.dev.tendLease()
		if changed, until := l.disks.origin.changed, l.dev.lease.Load(); changed > until {
			t.Errorf("a write of ours is %v beyond the lease", time.Duration(changed-until))
		}
	})(t)
}
