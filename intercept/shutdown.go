// Who is connected, and ending connections.

package intercept

import (
	"context"
	"fmt"
	"time"
)

// Client is a connection in the transmission phase.
type Client struct {
	Export string // canonical name
	Peer   string // for people: who it is
}

// Clients returns the connections that use an export now, in no order. Those
// whose export is gone, although they have not noticed, do not.
func (s *Server) Clients() []Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Client
	for c := range s.conns {
		if c.lease != nil && !c.lease.isClosed() {
			list = append(list, Client{Export: c.export, Peer: c.client})
		}
	}
	return list
}

// Disconnect cuts off the clients of an export and returns when their requests
// have ended and the export is released, or with an error when ctx ends; no
// new request of theirs begins in any case, nor of one that is just connecting,
// which may release the export a moment later. Who wants none of them back makes
// Exports.Open refuse before.
func (s *Server) Disconnect(ctx context.Context, export string) error {
	var cut []*connection
	s.mu.Lock()
	for c := range s.conns {
		if c.lease == nil {
			c.dropped = append(c.dropped, export)
		} else if c.export == export {
			c.lease.close()
			c.conn.Close()
			cut = append(cut, c)
		}
	}
	s.mu.Unlock()
	return wait(ctx, cut)
}

// Shutdown ends the server gracefully. Listeners are closed; requests in flight
// end and are answered, those that come meanwhile are answered with ESHUTDOWN,
// and each connection is closed when it has nothing left. If ctx ends first the
// rest is cut off, and the error says how many had not ended: their exports
// are released when the Device returns.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.stopping.Store(true)
	for l := range s.listeners {
		l.Close()
	}
	var left []*connection
	for c := range s.conns {
		left = append(left, c)
		c.conn.SetReadDeadline(time.Now()) // wakes its reader, which then looks at stopping
	}
	s.mu.Unlock()

	err := wait(ctx, left)
	s.cancel()
	if err != nil {
		for _, c := range left {
			c.conn.Close()
		}
	}
	return err
}

// wait returns when all of conns have ended, or with an error when ctx ends.
func wait(ctx context.Context, conns []*connection) error {
	for i, c := range conns {
		select {
		case <-c.done:
		case <-ctx.Done():
			return fmt.Errorf("wait for %d of %d connections: %w", len(conns)-i, len(conns), context.Cause(ctx))
		}
	}
	return nil
}
