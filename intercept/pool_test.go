package intercept

import (
	"fmt"
	"sync/atomic"
	"testing"
)

// TestPoolBounds fills a pool whose jobs hang: so many run, so many wait, and
// no more are taken; when they go on, all of them are done before close returns.
func TestPoolBounds(t *testing.T) {
	for _, spares := range []int{0, 3, maxSpares, maxSpares + 1} {
		t.Run(fmt.Sprint(spares, " spares"), func(t *testing.T) {
			dev, entered, release := gated("flush")
			conn := &tape{}
			left := &atomic.Int64{}
			left.Store(int64(spares))
			s := &session{dev: dev, sender: newSender(conn, 0), lease: &lease{release: nothing}, pool: newPool(left)}
			add := func() bool {
				s.lease.enter()
				return s.pool.do(newJob(s, &request{typ: NBD_CMD_FLUSH}))
			}
			running := maxWorkers + min(spares, maxSpares)
			for range maxWorkers {
				add()
				<-entered // one after the other, so that the queue is empty
			}
			for range maxQueue {
				add()
			}
			for range running - maxWorkers {
				<-entered // by a spare, from the queue
				if !add() {
					t.Fatal("a job was not taken although one had left the queue")
				}
			}
			s.pool.look()
			s.pool.look() // whoever waits is late by now
			if add() {
				t.Errorf("more than %d jobs were taken", running+maxQueue)
			}
			waiting := make(chan struct{})
			go func() { s.pool.doWait(newJob(s, &request{typ: NBD_CMD_FLUSH})); close(waiting) }()
			select {
			case <-waiting:
				t.Error("doWait returned although the queue is full")
			default:
			}
			s.pool.mu.Lock()
			if got := s.pool.workers; got != running {
				t.Errorf("workers\n got %d\nwant %d", got, running)
			}
			s.pool.mu.Unlock()
			close(release)
			<-waiting
			s.pool.close()
			if got, want := dev.flushes.Load(), int64(running+maxQueue+1); got != want {
				t.Errorf("jobs done\n got %d\nwant %d", got, want)
			}
			if got, want := conn.out.Len(), (running+maxQueue+1)*simpleReplySize; got != want {
				t.Errorf("bytes of replies\n got %d\nwant %d", got, want)
			}
			if got := left.Load(); got != int64(spares) {
				t.Errorf("spares at the end\n got %d\nwant %d", got, spares)
			}
		})
	}
}

// TestSparesStay hangs all of a connection's own workers: a spare serves what
// comes, and stays for what comes next; when the others are back it goes.
func TestSparesStay(t *testing.T) {
	dev, entered, release := gated("write")
	s, addr := startServer(t, Options{Exports: newShelf(map[string]Device{"disk": dev})})
	c := connect(t, addr, structured, "disk")
	var stuck []*exchange
	for range maxWorkers {
		stuck = append(stuck, c.start(request{typ: NBD_CMD_WRITE, n: 4096}, make([]byte, 4096)))
		<-entered
	}
	for range 5 {
		c.want(request{typ: NBD_CMD_READ, n: 4096}, nil, 0)
	}
	if s.spares.Load() == totalSpares {
		t.Error("there is no spare while all workers hang")
	}
	close(release)
	for _, x := range stuck {
		<-x.done
	}
	c.disconnect()
	if got := s.spares.Load(); got != totalSpares {
		t.Errorf("spares at the end\n got %d\nwant %d", got, totalSpares)
	}
}
