// One life of a daemon that will be killed: everybody who uses it.

package test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// life is the time from one start to the next kill.
type life struct {
	*siege
	killed  atomic.Bool // set before the daemon is killed
	running sync.WaitGroup

	left   atomic.Int64  // requests, until it is time to kill it
	time   chan struct{} // closed then
	enough func()        // closes it
}

// clientsPerDevice is how many requests are in flight to each device.
const clientsPerDevice = 3

// live lets everybody loose on the daemon, for so many requests.
func (s *siege) live(requests int64) *life {
	l := &life{siege: s, time: make(chan struct{})}
	l.enough = sync.OnceFunc(func() { close(l.time) })
	l.left.Store(requests)
	for _, k := range []*target{s.devices["vda"], s.devices["vdb"]} {
		for range clientsPerDevice {
			l.run("client of "+k.name, (&client{life: l, target: k}).step)
		}
	}
	l.run("keeper", l.keep)
	for range 2 {
		l.run("reader", l.readImage)
	}
	return l
}

// run calls step until the daemon is killed, or something fails before.
func (l *life) run(who string, step func(*rand.Rand) error) {
	rng := rand.New(rand.NewPCG(l.rng.Uint64(), l.rng.Uint64()))
	l.running.Go(func() {
		for !l.killed.Load() {
			err := step(rng)
			if err != nil && !l.killed.Load() {
				l.t.Errorf("%s: %v", who, err)
			}
			if err != nil || l.left.Add(-1) == 0 {
				l.enough()
			}
			if err != nil {
				return
			}
		}
	})
}

// endAfter kills the daemon a moment after it has done what it lives for, and returns
// when nobody uses it any more. Now and then it is at rest then.
func (l *life) endAfter(moment time.Duration) {
	l.t.Helper()
	select {
	case <-l.time:
	case <-time.After(patience):
		l.t.Errorf("%d requests are not done within %v", l.left.Load(), patience)
	}
	time.Sleep(moment)
	if l.rng.IntN(10) == 0 {
		l.rest()
	}
	l.killed.Store(true)
	l.d.kill()
	l.running.Wait()
}

// rest waits until nobody uses the daemon any more, and notes what the snapstore
// holds for whom then.
func (l *life) rest() {
	l.t.Helper()
	l.killed.Store(true)
	l.running.Wait()
	if slices.ContainsFunc(l.snapshots, func(sn *taken) bool { return !sn.expires.IsZero() }) {
		return // it may end meanwhile
	}
	same := 0 // in how many looks, 5 ms apart
	eventually(l.t, "the snapstore is at rest", func() bool {
		if use := l.measure(); use == l.use {
			same++
		} else {
			l.use, same = use, 0
		}
		return same == 20
	})
}

// connect is a connection to an export, which the caller closes.
func (l *life) connect(export string) (*nbdConn, error) {
	conn, err := net.Dial("unix", l.d.socket())
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(patience))
	c := &nbdConn{Conn: conn}
	if err := c.handshake(export); err != nil {
		conn.Close()
		return nil, fmt.Errorf("open export %s: %w", export, err)
	}
	return c, nil
}

// client is a connection to a device.
type client struct {
	*life
	*target
	conn  *nbdConn
	known int // the epoch in which it connected
}

// step does one thing to the device.
func (c *client) step(rng *rand.Rand) (err error) {
	c.pause.RLock()
	defer c.pause.RUnlock()
	if c.conn == nil || c.known != c.epoch {
		if c.conn != nil {
			c.conn.Close()
		}
		if c.conn, err = c.connect(c.disk.name); err != nil {
			return err
		}
		c.known = c.epoch
	}
	if rng.IntN(20) == 0 {
		return c.conn.flush()
	}
	off, n, ok := c.claim(rng, randomLength(rng))
	if !ok {
		return nil
	}
	defer c.release(off)
	if rng.IntN(8) == 0 {
		p := make([]byte, n)
		if err := c.conn.readAt(p, off); err != nil {
			return err
		}
		return c.holds(p, off)
	}
	return changeDisk(c.disk, c.conn, rng, off, n, c.pass())
}

// randomLength is at most 1 MiB; short lengths are as frequent as long ones.
func randomLength(rng *rand.Rand) int64 { return 4 * kiB << rng.IntN(9) }

// changeDisk writes, zeroes or trims a range of a disk that is claimed.
func changeDisk(k *disk, conn *nbdConn, rng *rand.Rand, off, n int64, pass uint64) error {
	var flags uint16
	if rng.IntN(8) == 0 {
		flags = NBD_CMD_FLAG_FUA
	}
	if kind := rng.IntN(10); kind < 2 {
		zeroes := k.send(off, make([]byte, n))
		if kind == 0 {
			if rng.IntN(2) == 0 {
				flags |= NBD_CMD_FLAG_NO_HOLE
			}
			if err := conn.do(NBD_CMD_WRITE_ZEROES, flags, off, uint32(n), nil, nil); err != nil {
				return err
			}
			k.ack(zeroes)
			return nil
		}
		// What was trimmed may be what it was, so it is written to.
		if err := conn.trim(off, n); err != nil {
			return err
		}
	}
	p := make([]byte, n)
	Stamp(p, k.name, off, pass)
	written := k.send(off, p)
	if err := conn.do(NBD_CMD_WRITE, flags, off, uint32(n), p, nil); err != nil {
		return err
	}
	k.ack(written)
	return nil
}

// refused says whether err is an answer of the daemon of one of the kinds.
func refused(err error, kinds ...string) bool {
	var r *apiError
	if !errors.As(err, &r) {
		return false
	}
	for _, k := range kinds {
		if r.Kind == k {
			return true
		}
	}
	return false
}
